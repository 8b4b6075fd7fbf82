package PBA::Bench::ProxmoxMade;

# An access made by hand with Proxmox' commands, as archive_external sends them today, with the methods that
# PBA::Bench::QemuServer calls.

use v5.36;

use JSON::PP ();

# execute: the code of a PBA::Bench::MonCmd; disks: from PBA::Test::VM; dir; target: the target-id; froze: a code
# ref that gets the seconds for which the guest would have been frozen.
sub new ($class, %options) {
    return bless({ %options, socket => "$options{dir}/nbd" }, $class);
}

sub uri ($self, $disk) { return "nbd+unix:///$disk->{device}?socket=$self->{socket}" }
sub context ($self) { return "qemu:dirty-bitmap:$self->{infos}[0]{'bitmap-name'}" }

# What a provider gets with the mechanism nbd.
sub volume ($self, $index) {
    my $info = $self->{infos}[$index];
    return {
        'nbd-path' => $self->{socket},
        'bitmap-mode' => $info->{'bitmap-action'} eq 'used' ? 'reuse' : 'new',
        $info->%{qw(size bitmap-name)},
    };
}

sub setup ($self, %options) {
    my @devices
        = map { { device => $_->{device}, 'bitmap-mode' => $options{mode} } } $self->{disks}->@*;
    $self->{execute}->('query-proxmox-support');
    my $began = PBA::Bench::now();
    $self->{infos} = $self->{execute}
        ->('backup-access-setup', { 'target-id' => $self->{target}, devices => \@devices });
    $self->{froze}->(PBA::Bench::now() - $began);
    $self->{execute}->('query-pbs-bitmap-info');
    return;
}

sub export ($self, %options) {
    unlink($self->{socket});
    my %address = (type => 'unix', data => { path => $self->{socket} });
    $self->{execute}->('nbd-server-start', { addr => \%address });
    for my $info ($self->{infos}->@*) {
        my %bitmap = (node => $info->{'bitmap-node-name'}, name => $info->{'bitmap-name'});
        my %export = (
            type => 'nbd',
            id => $info->{device},
            name => $info->{device},
            'node-name' => $info->{'node-name'},
            writable => JSON::PP::true,
            bitmaps => [\%bitmap],
        );
        $self->{execute}->('block-export-add', \%export);
    }
    return;
}

sub teardown ($self) {
    $self->{execute}->('nbd-server-stop');
    $self->{execute}
        ->('backup-access-teardown', { 'target-id' => $self->{target}, success => JSON::PP::true });
    return;
}

1;
