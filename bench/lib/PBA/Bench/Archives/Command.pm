package PBA::Bench::Archives::Command;

# PBA::Bench::Archives by the command. arguments: more of them for its backups.

use v5.36;

use File::Basename qw(basename);
use FindBin;

use parent -norequire, qw(PBA::Bench::Archives);

sub _command ($self, $name, @arguments) {
    my @perl = ($^X, map { "-I$_" } @INC);
    return $self->program(@perl, "$FindBin::Bin/../bin/pve-backup-access", $name, @arguments);
}

sub _qemu ($self) {
    return ('--qmp' => $self->{vm}->qmp_path, '--target-id' => basename($self->{dir}));
}

sub backup ($self) {
    my @options = (qw(--vmid 100 --quiet), $self->_qemu, $self->{arguments}->@*);
    return $self->_command('backup', $self->{dir}, @options);
}

sub lose_bitmap ($self) { return $self->_command('forget', $self->_qemu) }

sub verify ($self) { return $self->_command('verify', $self->{dir}, '--quiet') }

sub restore ($self) {
    return $self->_command('restore', "$self->{dir}/100", $self->empty_directory, '--quiet');
}

sub prune ($self) { return $self->_command('prune', $self->{dir}, qw(--keep-last 1 --quiet)) }

1;
