package PBA::Test::NBDServer::Connection;

# One client of PBA::Test::NBDServer: the protocol as in the NBD project's doc/proto.md.

use v5.36;

use Errno qw(EINVAL EOVERFLOW ENOTSUP);
use List::Util qw(max min);
use Time::HiRes qw(time);

use PBA::Test::NBDServer::Disk;
use PBA::Test::NBDServer::Protocol;

my %option_name = (
    1 => 'export_name',
    2 => 'abort',
    3 => 'list',
    6 => 'info',
    7 => 'go',
    8 => 'structured_reply',
    9 => 'list_meta_context',
    10 => 'set_meta_context',
);
my %command_name = (
    0 => 'read',
    1 => 'write',
    2 => 'disconnect',
    3 => 'flush',
    4 => 'trim',
    5 => 'cache',
    6 => 'write-zeroes',
    7 => 'block-status',
);

sub new ($class, $server, $client, $number, $options) {
    return bless {
        server => $server,
        client => $client,
        number => $number,
        options => $options,
        buffer => '',
        contexts => [],
        queue => [],
        trimmed => [],
        count => {},
    }, $class;
}

sub run ($self) {
    $self->_handshake;
    $self->_transmission;
    return;
}

# ---- input and output ----

sub _take ($self, $length) {
    while (length($self->{buffer}) < $length) {
        $self->{server}->receive_more($self->{client}, \$self->{buffer}) or die "end of stream\n";
    }
    return substr($self->{buffer}, 0, $length, '');
}

sub _send ($self, $bytes) {
    my $sent = $self->{server}->send_bytes($self->{client}, $bytes);
    die "client has gone\n" if $sent < length($bytes);
    return;
}

# ---- handshake ----

sub _handshake ($self) {
    $self->_send('NBDMAGIC' . 'IHAVEOPT' . pack('n', 3));
    my $flags = unpack('N', $self->_take(4));
    $self->{no_zeroes} = $flags & 2;
    while (!$self->{transmission}) {
        my ($magic, $option, $length) = unpack('a8NN', $self->_take(16));
        die "bad option magic\n" if $magic ne 'IHAVEOPT';
        die "option of $length bytes\n" if $length > 1 << 20;
        my $data = $self->_take($length);
        my $method = '_option_' . ($option_name{$option} // 'unknown');
        $method = '_option_unknown' if !$self->can($method);
        $self->$method($option, $data);
    }
    return;
}

sub _option_reply ($self, $option, $type, $data = '') {
    $self->_send(pack('Q>NNN', OPTION_REPLY_MAGIC, $option, $type, length($data)) . $data);
    return;
}

sub _option_unknown ($self, $option, $data) {
    $self->_option_reply($option, REP_ERR_UNSUP);
    return;
}

sub _option_abort ($self, $option, $data) {
    $self->_option_reply($option, REP_ACK);
    die "client aborted\n";
}

sub _option_export_name ($self, $option, $name) {
    die "no such export\n" if $name ne $self->{options}{export};
    my $padding = $self->{no_zeroes} ? '' : "\0" x 124;
    $self->_send(pack('Q>n', $self->_advertised_size, $self->_flags) . $padding);
    $self->{transmission} = 1;
    return;
}

sub _option_list ($self, $option, $data) {
    $self->_option_reply($option, REP_SERVER, pack('N/a*', $self->{options}{export}));
    $self->_option_reply($option, REP_ACK);
    return;
}

sub _option_structured_reply ($self, $option, $data) {
    $self->{structured} = 1;
    $self->_option_reply($option, REP_ACK);
    return;
}

sub _option_info ($self, $option, $data) {
    return $self->_send_info($option, $data);
}

sub _option_go ($self, $option, $data) {
    $self->{transmission} = $self->_send_info($option, $data);
    return;
}

sub _send_info ($self, $option, $data) {
    if (length($data) < 6 || length($data) < 6 + unpack('N', $data)) {
        $self->_option_reply($option, REP_ERR_INVALID);
        return 0;
    }
    if (unpack('N/a', $data) ne $self->{options}{export}) {
        $self->_option_reply($option, REP_ERR_UNKNOWN);
        return 0;
    }
    my $export = pack('nQ>n', 0, $self->_advertised_size, $self->_flags);
    $self->_option_reply($option, REP_INFO, $export);
    my @block_sizes = $self->_block_sizes->@*;
    $self->_option_reply($option, REP_INFO, pack('nNNN', 3, @block_sizes)) if @block_sizes;
    my $description = $self->{options}{description};
    $self->_option_reply($option, REP_INFO, pack('n', 2) . $description) if defined($description);
    $self->_option_reply($option, REP_ACK);
    return 1;
}

# The value of an option for this connection: a code ref gets the number of the connection.
sub _of_connection ($self, $value) {
    return ref($value) eq 'CODE' ? $value->($self->{number}) : $value;
}

sub _advertised_size ($self) {
    return $self->_of_connection($self->{options}{advertised_size}) // $self->{options}{size};
}

sub _block_sizes ($self) {
    return $self->_of_connection($self->{options}{block_sizes}) // BLOCK_SIZES;
}

sub _flags ($self) {
    my $flags = TRANSMISSION_FLAGS | ($self->{options}{keep} ? ZEROES_FLAG : 0);
    $flags &= ~FLAGS_OF_OPTIONS->{$_} for grep { $self->{options}{$_} } keys FLAGS_OF_OPTIONS->%*;
    return $flags;
}

sub _option_list_meta_context ($self, $option, $data) {
    $self->_send_contexts($option, $data);
    return;
}

sub _option_set_meta_context ($self, $option, $data) {
    $self->{contexts} = $self->_send_contexts($option, $data);
    return;
}

sub _send_contexts ($self, $option, $data) {
    my ($export, @queries) = eval { unpack('N/a N/(N/a)', $data) };
    if (!$self->{structured} || !defined($export)) {
        $self->_option_reply($option, REP_ERR_INVALID);
        return [];
    }
    if ($export ne $self->{options}{export}) {
        $self->_option_reply($option, REP_ERR_UNKNOWN);
        return [];
    }
    my $listing = $option_name{$option} eq 'list_meta_context';
    my @contexts = $self->_contexts_matching($listing, @queries);
    for my $context (@contexts) {
        my $id = $listing ? 0 : $context->{id};
        $self->_option_reply($option, REP_META_CONTEXT, pack('N', $id) . $context->{name});
    }
    $self->_option_reply($option, REP_ACK);
    return [map { $_->{id} } @contexts];
}

# A listing may ask for all contexts, or for all of a namespace; setting requires full names.
sub _contexts_matching ($self, $listing, @queries) {
    my @offered = ({ id => ALLOCATION_ID, name => 'base:allocation' });
    if ($self->{options}{offer_bitmap}) {
        my $name = "qemu:dirty-bitmap:$self->{options}{bitmap}";
        push @offered, { id => BITMAP_ID, name => $name };
    }
    return @offered if $listing && !@queries;
    my %wanted = map { $_ => 1 } @queries;
    return grep {
        my ($namespace, $kind) = $_->{name} =~ /^(\w+:)([\w-]+:)?/;
        $wanted{ $_->{name} }
            || $listing && ($wanted{$namespace} || defined($kind) && $wanted{"$namespace$kind"});
    } @offered;
}

# ---- transmission ----

# Reads all requests that have arrived before it answers the next one. So it knows how many are in flight, and a
# delay applies to all of them at the same time, not to one after the other.
sub _transmission ($self) {
    my $queue = $self->{queue};
    while (1) {
        my $wait = @$queue ? $queue->[0]{due} - time : undef;
        if (!defined($wait) || $wait > 0 || $self->_more_waiting) {
            my $ready = $self->{server}->wait_ready($self->{client}, 'read', $wait);
            $self->_take_in if $ready;
            next if $ready || $wait > 0;
        }
        $self->_answer(shift @$queue);
    }
}

sub _more_waiting ($self) {
    return $self->{server}->wait_ready($self->{client}, 'read', 0);
}

sub _take_in ($self) {
    $self->{server}->receive_more($self->{client}, \$self->{buffer}) or die "end of stream\n";
    while (length($self->{buffer}) >= 28) {
        my %request;
        (my $magic, @request{qw(flags type cookie offset length)})
            = unpack('NnnQ>Q>N', $self->_take(28));
        die "bad request magic\n" if $magic != REQUEST_MAGIC;
        $request{command} = $command_name{ $request{type} } // "unknown-$request{type}";
        $request{data} = $self->_take($request{length}) if $request{command} eq 'write';
        $request{due} = time + ($self->_of_connection($self->{options}{delay}) // 0);
        push @{ $self->{queue} }, \%request;
        $self->{server}->record(
            'request',
            connection => $self->{number},
            in_flight => scalar(@{ $self->{queue} }),
            map { $_ => $request{$_} } qw(command offset length flags),
        );
    }
    return;
}

sub _answer ($self, $request) {
    my $command = $request->{command};
    die "client disconnected\n" if $command eq 'disconnect';
    $self->{count}{$command}++;
    return if $self->_refuses_to_answer($request);
    my $errno = $self->_breaks_block_sizes($request);
    return $self->_send_error($request, $errno, 'not in whole blocks') if $errno;
    if ($command eq 'block-status') {
        $self->_answer_block_status($request);
    }
    elsif ($command eq 'read') {
        $self->_answer_read($request);
    }
    elsif ($command eq 'trim') {
        $self->_answer_trim($request);
    }
    elsif ($command eq 'write') {
        $self->_answer_write($request);
        $self->_send("\xa5" x 16) if $self->{number} == ($self->{options}{garbage_on} // 0);
    }
    elsif ($command eq 'write-zeroes' && $self->{options}{keep}) {
        $self->_answer_zeroes($request);
    }
    elsif ($command eq 'flush' && !$self->{options}{no_flush}) {
        $self->_send_done($request);
    }
    else {
        $self->_send_error($request, ENOTSUP, 'not supported');
    }
    return;
}

# The value of an option for misbehaviour, once good_first has been reached.
sub _fault ($self, $name, $request) {
    return undef if $self->{count}{ $request->{command} } <= $self->{options}{good_first};
    return $self->{options}{$name};
}

sub _refuses_to_answer ($self, $request) {
    my $command = $request->{command};
    return 1 if $command eq 'flush' && $self->{options}{hang_flush};
    my $never_at = $self->{options}{"hang_${command}_at"};
    return 1 if defined($never_at) && _covers($request, $never_at);
    return 0 if $command ne 'block-status' && $command ne 'read';
    my $after = $self->{options}{disconnect_after};
    die "disconnected after $after requests\n"
        if $command eq 'block-status' && defined($after) && $self->{count}{$command} > $after;
    my $at = $self->_fault('disconnect_at', $request);
    die "disconnected at $at\n" if defined($at) && _covers($request, $at);
    my $hang_at = $self->_fault('hang_at', $request);
    return defined($hang_at) && _covers($request, $hang_at);
}

# The error of a server that enforces its block sizes.
sub _breaks_block_sizes ($self, $request) {
    my $command = $request->{command};
    return 0 if !$self->_of_connection($self->{options}{strict_blocks}) || $command eq 'flush';
    my ($min, undef, $max) = $self->_block_sizes->@*;
    my $has_data = $command eq 'read' || $command eq 'write';
    return EINVAL if ($request->{offset} | $request->{length}) % $min;
    return $has_data && $request->{length} > $max ? EOVERFLOW : 0;
}

sub _covers ($request, $offset) {
    return $offset >= $request->{offset} && $offset < $request->{offset} + $request->{length};
}

sub _in_range ($self, $request) {
    my $end = $request->{offset} + $request->{length};
    return $request->{length} > 0 && $end <= $self->_advertised_size;
}

# ---- replies ----

sub _chunk ($request, $type, $payload, $flags) {
    return
        pack('NnnQ>N', CHUNK_MAGIC, $flags, $type, $request->{cookie}, length($payload)) . $payload;
}

# If the test requests it, sends only half of the reply and ends the connection.
sub _send_reply ($self, $request, $bytes) {
    my $disconnect = $self->_fault('disconnect_in', $request) // '';
    if ($disconnect eq $request->{command}) {
        $self->_send(substr($bytes, 0, length($bytes) >> 1));
        die "disconnected in the middle of a reply\n";
    }
    $self->_send($bytes);
    return;
}

sub _send_done ($self, $request) {
    my $simple = pack('NNQ>', SIMPLE_MAGIC, 0, $request->{cookie});
    my $chunk = _chunk($request, CHUNK_NONE, '', CHUNK_DONE);
    $self->_send($self->{structured} ? $chunk : $simple);
    return;
}

sub _send_error ($self, $request, $errno, $message) {
    my $simple = pack('NNQ>', SIMPLE_MAGIC, $errno, $request->{cookie});
    my $chunk = _chunk($request, CHUNK_ERROR, pack('Nn/a*', $errno, $message), CHUNK_DONE);
    $self->_send($self->{structured} ? $chunk : $simple);
    return;
}

# ---- commands ----

sub _answer_read ($self, $request) {
    $self->{server}->record('done', connection => $self->{number}, %$request{qw(offset length)});
    my $errno = $self->_fault('read_error', $request);
    return $self->_send_error($request, $errno, 'told to fail') if $errno;
    return $self->_send_error($request, EINVAL, 'outside the disk') if !$self->_in_range($request);
    return $self->_send_error($request, EINVAL, 'not accessible') if !$self->_readable($request);
    return $self->_send_done($request) if $self->_fault('missing_data', $request);

    my $length = $request->{length} - ($self->_fault('short_read', $request) // 0);
    my $data
        = $self->{options}{reads_back}
        ? $self->_disk->read($request->{offset}, $length)
        : $self->{options}{data}->($request->{offset}, $length);
    my $simple = pack('NNQ>', SIMPLE_MAGIC, 0, $request->{cookie}) . $data;
    my $payload = pack('Q>', $request->{offset}) . $data;
    my $chunk = _chunk($request, CHUNK_DATA, $payload, CHUNK_DONE);
    $self->_send_reply($request, $self->{structured} ? $chunk : $simple);
    return;
}

sub _readable ($self, $request) {
    return 1 if !$self->{options}{dirty_only};
    my ($start, $end) = ($request->{offset}, $request->{offset} + $request->{length});
    return 0 if grep { $_->[0] < $end && $_->[1] > $start } @{ $self->{trimmed} };
    for (my $offset = $start; $offset < $end;) {
        my ($length, $flags) = $self->{options}{extent_at}->($offset);
        return 0 if !($flags & 1);
        $offset += $length;
    }
    return 1;
}

# A snapshot does not accept writes, although it is advertised as writable.
sub _answer_write ($self, $request) {
    my $errno = $self->{options}{dirty_only} ? ENOTSUP : $self->_fault('write_error', $request);
    return $self->_send_error($request, $errno, 'told to fail') if $errno;
    $self->_keep($request, $request->{data});
    $self->_send_done($request);
    return;
}

sub _answer_zeroes ($self, $request) {
    my $errno = $self->_fault('zero_error', $request);
    $self->_keep($request, $errno ? '' : "\0" x $request->{length});
    return $self->_send_error($request, $errno, 'told to fail') if $errno;
    $self->_send_done($request);
    return;
}

# Called before the answer, because after it the client may send a request for the same place again.
sub _keep ($self, $request, $data) {
    return if !$self->{options}{keep};
    $self->_disk->write($request->{offset}, $data);
    $self->{server}
        ->record('answer', answered => 1, map { $_ => $request->{$_} } qw(offset length));
    return;
}

sub _disk ($self) { return $self->{disk} //= PBA::Test::NBDServer::Disk->new($self->{options}) }

sub _answer_trim ($self, $request) {
    my $errno = $self->_fault('trim_error', $request);
    return $self->_send_error($request, $errno, 'told to fail') if $errno;
    return $self->_send_error($request, EINVAL, 'outside the disk') if !$self->_in_range($request);
    push @{ $self->{trimmed} }, [$request->{offset}, $request->{offset} + $request->{length}];
    $self->_send_done($request);
    return;
}

sub _answer_block_status ($self, $request) {
    my $errno = $self->_fault('block_status_error', $request);
    return $self->_send_error($request, $errno, 'told to fail') if $errno;
    my @ids = @{ $self->{contexts} };
    $errno = $self->{options}{allocation_error};
    return $self->_send_error($request, $errno, 'told to fail')
        if $errno && grep({ $_ == ALLOCATION_ID } @ids);
    return $self->_send_error($request, EINVAL, 'no context negotiated') if !@ids;
    return $self->_send_error($request, EINVAL, 'outside the disk') if !$self->_in_range($request);
    return $self->_send_error($request, EINVAL, 'not accessible')
        if grep({ $_ == ALLOCATION_ID } @ids) && !$self->_readable($request);

    my $reply = '';
    for my $index (0 .. $#ids) {
        my $payload = $self->_block_status_payload($request, $ids[$index]);
        my $flags = $index == $#ids ? CHUNK_DONE : 0;
        $reply .= _chunk($request, CHUNK_BLOCK_STATUS, $payload, $flags);
    }
    $self->_send_reply($request, $reply);
    return;
}

sub _block_status_payload ($self, $request, $id) {
    return pack('N*', $id, $self->_allocation($request)) if $id == ALLOCATION_ID;
    $id = WRONG_ID if $self->_fault('wrong_context_id', $request);
    return pack('N', $id) if $self->_fault('no_extents', $request);
    return pack('NNN', $id, 0, 1) if $self->_fault('only_zero_extents', $request);
    my @extents = $self->_extents($request);
    unshift @extents, 0, 1 if $self->_fault('zero_extent', $request);
    return pack('N*', $id, @extents);
}

sub _allocation ($self, $request) {
    my ($offset, $end) = ($request->{offset}, $request->{offset} + $request->{length});
    my @extents;
    for my $hole (@{ $self->{options}{holes} }) {
        my ($from, $to) = (max($hole->[0], $offset), min($hole->[0] + $hole->[1], $end));
        next if $from >= $to;
        push @extents, $from - $offset, 0 if $from > $offset;
        push @extents, $to - $from, HOLE_AND_ZERO;
        $offset = $to;
    }
    push @extents, $end - $offset, 0 if $offset < $end;
    return @extents;
}

sub _extents ($self, $request) {
    my ($offset, $end) = ($request->{offset}, $request->{offset} + $request->{length});
    my $max = $self->_fault('max_extents', $request) // 131_072;
    $max = 1 if $request->{flags} & FLAG_REQ_ONE;
    my $more = $self->_fault('answer_more', $request);
    my $unknown_flags = $self->_fault('unknown_flags', $request) // 0;
    my $extent_at = $self->{options}{extent_at};
    my @extents;
    while ($offset < $end && @extents < 2 * $max) {
        my ($length, $flags) = $extent_at->($offset);
        $length = min($length, 0xffff0000);
        $length = min($length, $end - $offset) if !$more;
        die "extent of length $length at $offset\n" if $length <= 0;
        push @extents, $length, $flags | $unknown_flags;
        $offset += $length;
    }
    my $beyond = $self->_fault('beyond_end', $request) // 0;
    $extents[-2] += $beyond if $offset >= $self->_advertised_size;
    return @extents;
}

1;
