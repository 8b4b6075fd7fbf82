package PVE::BackupAccess::Provider::Qcow2Chain::Store;

# A device's data on its way from the guest into an archive.

use v5.36;

use Exporter qw(import);

use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Provider::Qcow2Chain::Content qw(check_base check_stored);
use PVE::BackupAccess::Provider::Qcow2Chain::Image qw($cluster_size);
use PVE::BackupAccess::Provider::Qcow2Chain::Server;
use PVE::BackupAccess::Volume;

our @EXPORT_OK = qw(store_device);

my $Server = 'PVE::BackupAccess::Provider::Qcow2Chain::Server';

my sub stored ($statistics, $base) {
    my ($written, $zero, $unchanged) = $statistics->@{qw(bytes-written bytes-zero bytes-unchanged)};
    my $more = defined($base) || !$unchanged ? '' : ', ' . bytes($unchanged) . ' are unchanged';
    return sprintf(
        '%s%s%s in %.1f s (%s of it zero%s)',
        defined($base) ? 'read in full, stored ' : 'stored ',
        bytes($written + $zero),
        defined($base) ? " that differ from $base" : '',
        $statistics->{seconds},
        bytes($zero), $more
    );
}

my sub copy_data ($archive, $device, $volume, $image, $chain, $options) {
    my $server = $Server->start($image, writable => 1);
    my $reader = PVE::BackupAccess::Volume->open($device, $volume);
    my $statistics = $reader->copy(
        to => $server->uri,
        digests => $archive->digests($device),
        $chain->@* ? (unchanged => [map { $_->digests($device) } $chain->@*]) : (),
        'cluster-size' => $cluster_size,
        $options->%*,
    );
    $reader->close;
    $server->stop;
    return $statistics;
}

# On top of a chain of archives, the newest first, or of none. how: log, a code ref; check, whether what
# was written is read back; copy, more options of the copy.
sub store_device ($archive, $device, $volume, $chain, %how) {
    my $mode = $volume->{'bitmap-mode'};
    my $base = $chain->@* ? $chain->[0]->name : undef;
    my $is_compared = defined($base) && $mode ne 'reuse';
    my $kind
        = $is_compared ? "what differs from $base"
        : defined($base) ? "incremental, on $base"
        : 'full';
    $how{log}->('info', "$device: storing, $kind");

    # The caller's may wait for every child, or ignore them all.
    local $SIG{CHLD} = 'DEFAULT';
    my %about = (size => $volume->{size}, 'bitmap-mode' => $mode);
    my $image = $archive->add_device($device, \%about, $chain->[0]);
    my $statistics = copy_data($archive, $device, $volume, $image, $chain, $how{copy});
    $how{log}->('info', "$device: " . stored($statistics, $is_compared ? $base : undef));
    return if !$how{check};
    check_stored($archive, $device, $how{log});
    check_base($archive, $device, $how{log}, $chain->@*) if $is_compared;
    return;
}

1;
