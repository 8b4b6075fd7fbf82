package PBA::Bench::ProxmoxMade;

# An access made of Proxmox' commands by hand, as archive_external sends them today, with what
# PBA::Bench::QemuServer wants of it.

use v5.36;

use JSON::PP ();

# execute => as the code of a PBA::Bench::MonCmd, disks => of PBA::Test::VM, dir, target => its id; froze =>
# code that is given how many seconds the guest would have been frozen.
sub new ($class, %options) {
    return bless({ %options, socket => "$options{dir}/nbd" }, $class);
}

sub uri ($self, $disk) { return "nbd+unix:///$disk->{device}?socket=$self->{socket}" }
sub context ($self) { return "qemu:dirty-bitmap:$self->{infos}[0]{'bitmap-name'}" }

# What a provider is given by mechanism nbd.
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
