package PBA::Test::NBDServer;

# A small NBD server (fixed newstyle, structured replies, dirty bitmap and base:allocation contexts) with one
# process per connection. It behaves correctly unless an option makes it misbehave.
#
#   my $server = PBA::Test::NBDServer->start(
#       size => $bytes, export => 'disk', bitmap => 'bitmap0',
#       dirty => [[$offset, $length], ...],     # in order; or sub ($offset) => ($length, $flags)
#       data => sub ($offset, $length) { ... }, # default: pattern() of this module
#   );
#   $server->uri; $server->socket_path; $server->context;
#   $server->requests('block-status'); $server->max_in_flight;
#
# Writes are accepted and their data is dropped, except with dirty_only, which refuses them. With keep => 1,
# writes and zeroes are kept, and content() returns what the disk contains, with "\xee" where nothing was
# written. With reads_back => 1, reads return that. block_sizes => [$minimum, $preferred, $maximum], or [] for
# none; strict_blocks => 1 refuses requests that violate them. holes => [[$offset, $length], ...], in order, is
# what base:allocation reports; data should be zeroes there. description => of the export.
#
# To behave like a snapshot-access node with a bitmap:
#   dirty_only => 1         EINVAL for reads and allocation outside dirty areas, or where trimmed
#
# Misbehaviour (good_first => N: only after N correct answers to the command in question):
#   max_extents => N        never more than N extents in one answer
#   answer_more => 1        the last extent is not cut off at the end of the request
#   zero_extent => 1        the answer begins with an extent of length 0
#   no_extents => 1         the answer has no extents
#   only_zero_extents => 1  the answer is one extent of length 0
#   beyond_end => N         the last extent of the disk is N bytes too long
#   unknown_flags => BITS   set in every extent
#   wrong_context_id => 1   the answer is for a context that was not requested
#   offer_bitmap => 0       the context does not exist
#   advertised_size => N    a size that differs from the true one
#                           (this, block_sizes, strict_blocks, delay: also sub ($connection) => value)
#   block_status_error, read_error, trim_error, write_error => ERRNO
#   allocation_error => ERRNO   for a block status with base:allocation
#   zero_error => ERRNO     for a write of zeroes, which keep makes possible
#   loses => [[$offset, $length], ...]          with keep: what is written there is not kept
#   returns_wrong => [[$offset, $length], ...]  with reads_back: other bytes than those that are kept
#   no_multi => 1           does not allow several connections
#   no_trim => 1            does not allow discards
#   no_flush => 1           does not support flushes, and does not advertise them
#   hang_flush => 1         flushes are never answered
#   garbage_on => N         on the Nth connection, the answer to a write is followed by invalid bytes
#   hang_write_at, hang_trim_at => OFFSET   a write or trim at that offset is never answered
#   short_read => N         the data is N bytes shorter than requested, and the read reports success
#   missing_data => 1       a read reports success without any data
#   delay => SECONDS        per request, counted from its arrival, so that requests in flight overlap
#   disconnect_after => N   block status requests
#   disconnect_at => OFFSET when a block status or read request covers it
#   disconnect_in => 'block-status' or 'read': in the middle of the reply's chunk
#   hang_at => OFFSET       a request that covers it is never answered; the connection stays open

use v5.36;

use Exporter qw(import);
use parent 'PBA::Test::Peer';

our @EXPORT_OK = qw(open_volume pattern);

use List::Util qw(max);
use POSIX ();

use PBA::Test::NBDServer::Connection;
use PBA::Test::NBDServer::Disk;

# ---- in the test ----

sub start ($class, %options) {
    my %defaults = (size => 1 << 30, export => 'disk', bitmap => 'bitmap0', dirty => []);
    my $self = $class->SUPER::start(%defaults, %options);
    return $self;
}

# A volume of the module under test on this server. %more is added to its hash; undef removes a key.
sub open_volume ($self, %more) {
    require PVE::BackupAccess::Volume;
    my $volume = {
        'nbd-path' => $self->socket_path,
        size => $self->{size},
        'bitmap-mode' => 'reuse',
        'bitmap-name' => $self->{bitmap},
        %more,
    };
    defined($volume->{$_}) or delete($volume->{$_}) for keys %$volume;
    return PVE::BackupAccess::Volume->open($self->{export}, $volume);
}

sub context ($self) { return "qemu:dirty-bitmap:$self->{bitmap}" }

sub uri ($self, $export = $self->{export}) {
    return "nbd+unix:///$export?socket=$self->{socket}";
}

# The requests that the server has received: { command, offset, length, flags, connection, in_flight }.
sub requests ($self, $command = undef) {
    return grep { !defined($command) || $_->{command} eq $command } $self->records('request');
}

sub max_in_flight ($self) {
    my $max = 0;
    for my $request ($self->requests) {
        $max = $request->{in_flight} if $request->{in_flight} > $max;
    }
    return $max;
}

# Describes reads that arrived before an overlapping read was answered. If a client disconnects, its
# reads continue, as in QEMU.
sub overlapping_reads ($self) {
    my (@open, @overlapping);
    for my $record ($self->records) {
        my ($begin, $end)
            = ($record->{offset} // 0, ($record->{offset} // 0) + ($record->{length} // 0));
        if ($record->{kind} eq 'request' && $record->{command} eq 'read') {
            push @overlapping,
                map { "$record->{length} at $begin while $_->{length} at $_->{offset}" }
                grep { $_->{offset} < $end && $begin < $_->{offset} + $_->{length} } @open;
            push @open, $record;
        }
        elsif ($record->{kind} eq 'done') {
            @open = grep { $_->{connection} != $record->{connection} || $_->{offset} != $begin }
                @open;
        }
    }
    return @overlapping;
}

# The requests that the kept disk has received, and with { answered } those that were executed, in
# chronological order.
sub changes ($self) {
    return grep { $_->{answered} || ($_->{command} // '') =~ m/\Awrite/ } $self->records;
}

sub content ($self) {
    open(my $fh, '<:raw', "$self->{dir}/content") or die "$self->{dir}/content: $!\n";
    local $/ = undef;
    return <$fh>;
}

sub connections ($self) { return scalar(() = $self->records('connected')) }
sub disconnections ($self) { return scalar(() = $self->records('closed')) }

# The default content of a disk: each 8 bytes contain their own offset.
sub pattern ($offset, $length) {
    my ($part, $words) = (1 << 16, (1 << 16) / 8);
    state $low
        = pack('Q>*', map { $_ * 8 } 0 .. $words - 1);    # the two bytes that differ within a part
    my ($first, $end) = ($offset - $offset % $part, $offset + $length);
    my $bytes = '';
    for (my $at = $first; $at < $end; $at += $part) {
        $bytes .= $low |. (pack('Q>', $at) x $words);
    }
    return substr($bytes, $offset - $first, $length);
}

# ---- in the server's process ----

sub serve ($self, $listener) {
    my %options = (
        data => \&pattern,
        offer_bitmap => 1,
        good_first => 0,
        holes => [],
        %$self,
        extent_at => ref($self->{dirty}) eq 'CODE' ? $self->{dirty} : _extents_of_list($self),
    );
    $SIG{CHLD} = 'IGNORE';
    PBA::Test::NBDServer::Disk::make("$self->{dir}/content", $self->{size}) if $options{keep};
    for (my $number = 1;; $number++) {
        $self->wait_ready($listener, 'read');
        my $client = $listener->accept or next;
        my $pid = fork() // die "cannot fork: $!\n";
        next if $pid;
        close($listener);
        $self->_serve_connection($client, $number, \%options);
    }
}

sub _serve_connection ($self, $client, $number, $options) {
    $client->blocking(0);
    $self->record('connected', connection => $number);
    my $connection = PBA::Test::NBDServer::Connection->new($self, $client, $number, $options);
    my $ok = eval { $connection->run; 1 };
    my $why = $ok ? 'end of stream' : $@ =~ s/\n\z//r;
    $self->record('closed', connection => $number, why => $why);
    POSIX::_exit(0);
}

# The answer that a code ref would return: the distance from an offset to the next change, and the
# flags.
sub _extents_of_list ($self) {
    my $size = max($self->{size}, $self->{advertised_size} // 0);
    my @ranges = @{ $self->{dirty} };
    my $index = 0;
    return sub ($offset) {
        $index = 0 if $index > 0 && $offset < $ranges[$index - 1][0] + $ranges[$index - 1][1];
        $index++ while $index < @ranges && $ranges[$index][0] + $ranges[$index][1] <= $offset;
        return ($size - $offset, 0) if $index == @ranges;
        my ($start, $length) = @{ $ranges[$index] };
        return $offset < $start ? ($start - $offset, 0) : ($start + $length - $offset, 1);
    };
}

1;
