package PBA::Bench::Archives::Command;

# PBA::Bench::Archives by the command. arguments: more of them for its backups.

use v5.36;

use File::Basename qw(basename dirname);
use FindBin;

use PVE::BackupAccess;

use parent -norequire, qw(PBA::Bench::Archives);

sub _command ($self, $name, @arguments) {
    my @perl = ($^X, '-T', map { "-I$_" } @INC);
    return $self->program(@perl, "$FindBin::Bin/../bin/pve-backup-access", $name, @arguments);
}

sub backup ($self) {
    return $self->_command(
        'backup', $self->{dir},
        '--qmp' => $self->{vm}->qmp_path,
        '--target-id' => basename($self->{dir}),
        '--fleecing-dir' => dirname($self->{dir}),
        qw(--vmid 100 --quiet), $self->{arguments}->@*,
    );
}

# The command appends a digest to the target that it is given.
sub lose_bitmap ($self) {
    my %qmp = (qmp => $self->{vm}->qmp_path);
    my $name = basename($self->{dir});
    my ($target) = grep { m/\A\Q$name\E@/ }
        map { $_->{'target-id'} // '' } PVE::BackupAccess->status(%qmp)->{bitmaps}->@*;
    PVE::BackupAccess->forget(%qmp, 'target-id' => $target // die "$name has no bitmap\n");
    return;
}

sub verify ($self) { return $self->_command('verify', $self->{dir}, '--quiet') }

sub restore ($self) {
    return $self->_command('restore', "$self->{dir}/100", $self->empty_directory, '--quiet');
}

sub prune ($self) { return $self->_command('prune', $self->{dir}, qw(--keep-last 1 --quiet)) }

1;
