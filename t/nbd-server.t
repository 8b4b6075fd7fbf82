# The misbehaving NBD server of the tests: without options, real clients find it correct; with an option, it
# misbehaves exactly in this way. The test records how libnbd's own tools react, because the tests of the module
# rely on it.

use v5.36;

use lib 't/lib';

use File::Temp ();
use List::Util qw(pairkeys sum);
use Test::More;

use PBA::Test::NBDServer qw(pattern);

my $KiB = 1 << 10;
my $MiB = 1 << 20;

for my $tool (qw(nbdinfo nbdcopy)) {
    plan(skip_all => "no $tool") if !grep { -x "$_/$tool" } split(/:/, $ENV{PATH});
}

sub start (%options) {
    return PBA::Test::NBDServer->start(size => 8 * $MiB, %options);
}

# The lines of the output and the exit status, without the tools' error messages.
sub run_tool (@command) {
    my $pid = open(my $fh, '-|') // die "cannot fork: $!\n";
    if (!$pid) {
        open(STDERR, '>', '/dev/null') or exit(126);
        exec(@command) or exit(127);
    }
    my @lines = <$fh>;
    close($fh);
    return ($? >> 8, @lines);
}

sub map_of ($server) {
    my ($status, @lines) = run_tool('nbdinfo', '--map=' . $server->context, $server->uri);
    return ($status, map { [(split(' ', $_))[0 .. 2]] } @lines);
}

sub map_fails ($server, $name) {
    my ($status, @map) = map_of($server);
    isnt($status, 0, "$name: nbdinfo --map fails") or diag(explain(\@map));
    return;
}

my @dirty = ([0, 64 * $KiB], [1 * $MiB, 192 * $KiB], [8 * $MiB - 64 * $KiB, 64 * $KiB]);
my @expected_map = (
    [0, 64 * $KiB, 1],
    [64 * $KiB, 960 * $KiB, 0],
    [1 * $MiB, 192 * $KiB, 1],
    [1 * $MiB + 192 * $KiB, 6912 * $KiB, 0],
    [8 * $MiB - 64 * $KiB, 64 * $KiB, 1],
);

subtest 'a correct server' => sub {
    my $server = start(dirty => \@dirty);
    my ($status, @lines) = run_tool('nbdinfo', '--size', $server->uri);
    is($status, 0, 'nbdinfo --size');
    is_deeply([map { $_ + 0 } @lines], [8 * $MiB], 'size');
    ($status, @lines) = run_tool('nbdinfo', $server->uri);
    my $context = quotemeta($server->context);
    like(join('', @lines), qr/base:allocation.*$context/s, 'both contexts are listed');
    ($status, @lines) = run_tool('nbdinfo', '--list', $server->uri);
    like(join('', @lines), qr/export="disk"/, 'export listed');

    ($status, my @map) = map_of($server);
    is($status, 0, 'nbdinfo --map');
    is_deeply(\@map, \@expected_map, 'map of the bitmap');
    isnt((run_tool('nbdinfo', '--size', $server->uri('other')))[0], 0, 'unknown export refused');
};

subtest 'a code ref as the map' => sub {
    my $step = 64 * $KiB;
    my $extent_at = sub ($offset) { return ($step - $offset % $step, ($offset / $step) & 1) };
    my ($status, @map) = map_of(start(dirty => $extent_at));
    is($status, 0, 'nbdinfo --map');
    is_deeply(\@map, [map { [$_ * $step, $step, $_ & 1] } 0 .. 127], 'map of the bitmap');
};

subtest 'reading' => sub {
    my $server = start(dirty => \@dirty);
    my $dir = File::Temp->newdir;
    my ($status) = run_tool('nbdcopy', $server->uri, "$dir/copy");
    is($status, 0, 'nbdcopy');
    open(my $fh, '<:raw', "$dir/copy") or die "cannot read the copy: $!\n";
    my $copy = do { local $/; <$fh> };
    ok($copy eq pattern(0, 8 * $MiB), 'data as the pattern says');
    is(pattern(13, 6), substr($copy, 13, 6), 'unaligned part of the pattern');
    cmp_ok(scalar($server->requests('read')), '>', 0, 'reads recorded');
    my $delayed = start(delay => 0.05);
    ($status) = run_tool('nbdcopy', '--request-size=262144', $delayed->uri, 'null:');
    is($status, 0, 'nbdcopy with a delay');
    cmp_ok($delayed->max_in_flight, '>', 1, 'more than one request in flight seen');

    isnt((run_tool('nbdcopy', start(read_error => 5)->uri, 'null:'))[0], 0, 'read error');
    my $dirty_only = start(dirty => \@dirty, dirty_only => 1);
    isnt((run_tool('nbdcopy', $dirty_only->uri, 'null:'))[0], 0, 'clean parts unreadable');
    my $all_dirty = start(dirty => [[0, 8 * $MiB]], dirty_only => 1);
    is((run_tool('nbdcopy', $all_dirty->uri, 'null:'))[0],
        0, 'an all-dirty disk can be read completely');
};

subtest 'trimming, from another client' => sub {
    plan(skip_all => 'no qemu-io') if !grep { -x "$_/qemu-io" } split(/:/, $ENV{PATH});
    my $server = start(dirty => [[0, 8 * $MiB]], dirty_only => 1);
    my @qemu_io = qw(qemu-io -d unmap -f raw);
    my ($status) = run_tool(@qemu_io, '-c', 'discard 1M 64k', $server->uri);
    is($status, 0, 'qemu-io discard');
    my ($trim) = $server->requests('trim');
    is_deeply([@$trim{qw(offset length)}], [1 * $MiB, 64 * $KiB], 'trim recorded');
    isnt((run_tool(@qemu_io, '-c', 'write 0 64k', $server->uri))[0], 0, 'writing refused');
    ($status) = run_tool(@qemu_io, qw(-c), 'discard 1M 64k', '-c', 'read 1M 512', $server->uri);
    isnt($status, 0, 'unreadable after the trim');
    ($status) = run_tool(@qemu_io, qw(-c), 'discard 1M 64k', '-c', 'read 2M 512', $server->uri);
    is($status, 0, 'readable elsewhere');
    isnt((run_tool(@qemu_io, '-c', 'discard 1M 64k', start(trim_error => 5)->uri))[0],
        0, 'trim_error');
};

subtest 'unusual but correct answers' => sub {
    for my $options ([max_extents => 1], [max_extents => 2], [answer_more => 1]) {
        my $server = start(dirty => \@dirty, @$options);
        my ($status, @map) = map_of($server);
        is($status, 0, "@$options: nbdinfo --map");
        is_deeply(\@map, \@expected_map, "@$options: map of the bitmap");
    }
    my $short = start(dirty => \@dirty, max_extents => 1);
    map_of($short);
    is(scalar($short->requests('block-status')), 5, 'one extent per answer');

    my (undef, @map) = map_of(start(dirty => \@dirty, unknown_flags => 0x40));
    is_deeply([map { $_->[2] } @map], [0x41, 0x40, 0x41, 0x40, 0x41], 'unknown flags sent');
};

subtest 'lies' => sub {
    map_fails(start(dirty => \@dirty, offer_bitmap => 0), 'offer_bitmap => 0');
    map_fails(start(dirty => \@dirty, block_status_error => 5), 'block_status_error');
    map_fails(start(dirty => \@dirty, no_extents => 1), 'no_extents');
    map_fails(start(dirty => \@dirty, disconnect_at => 2 * $MiB), 'disconnect_at');
    map_fails(start(dirty => \@dirty, disconnect_in => 'block-status'), 'disconnect_in');
    my $server = start(dirty => \@dirty, max_extents => 1, disconnect_after => 2);
    map_fails($server, 'disconnect_after');
    is(scalar($server->requests('block-status')), 3, 'the third request was not answered');
    like(
        $server->wait_for_record('closed')->{why},
        qr/^disconnected after 2/,
        'the record says why'
    );

    my $hanging = start(dirty => \@dirty, hang_at => 0);
    my @command = (qw(timeout 1 nbdinfo), '--map=' . $hanging->context, $hanging->uri);
    is((run_tool(@command))[0], 124, 'hang_at: no answer');

    my $last = sub (%options) {
        my ($status, @map) = map_of(start(dirty => \@dirty, %options));
        return $map[-1] ? $map[-1][0] + $map[-1][1] : "nothing, status $status";
    };
    is($last->(advertised_size => 7 * $MiB), 7 * $MiB, 'advertised_size');
};

# Correct clients reject these, depending on their version, and less careful ones loop, so the test looks at the
# bytes on the connection.
subtest 'lies in the bytes on the wire' => sub {
    my %payload = (
        zero_extent => sub (@words) { return $words[1] == 0 && $words[3] == 65536 },
        only_zero_extents => sub (@words) { return @words == 3 && $words[1] == 0 },
        wrong_context_id => sub (@words) { return $words[0] == 4711 },
        beyond_end => sub ($id, @extents) { return sum(pairkeys(@extents)) == 8 * $MiB + 1 },
    );
    for my $name (sort keys %payload) {
        my @words = block_status_words(start(dirty => \@dirty, $name => 1));
        ok($payload{$name}->(@words), $name) or diag("@words");
    }
    my @words = block_status_words(start(dirty => \@dirty, good_first => 1, no_extents => 1));
    cmp_ok(scalar(@words), '>', 1, 'good_first: the first answer is a good one');
    is(length(read_payload(start(short_read => 512), 4096)), 8 + 4096 - 512, 'short_read');
    is(length(read_payload(start(missing_data => 1), 4096)), 0, 'missing_data');
};

# The smallest possible client: negotiates, sends one request, and returns the payload of the first chunk.
sub one_chunk ($server, $type, $length) {
    my $socket = IO::Socket::UNIX->new(Peer => $server->socket_path) or die "connect: $!\n";
    my $take = sub ($n) {
        my $bytes = '';
        while (length($bytes) < $n) {
            sysread($socket, $bytes, $n - length($bytes), length($bytes)) or die "no answer\n";
        }
        return $bytes;
    };
    my $option = sub ($number, $data) {
        syswrite($socket, pack('a8NN/a*', 'IHAVEOPT', $number, $data));
        while (1) {
            my (undef, undef, $reply, $n) = unpack('Q>NNN', $take->(20));
            $take->($n);
            die "option refused\n" if $reply & 0x80000000;
            return if $reply == 1;
        }
    };
    $take->(18);
    syswrite($socket, pack('N', 3));
    $option->(8, '');
    $option->(10, pack('N/a*N/(N/a*)', 'disk', $server->context));
    $option->(7, pack('N/a*n', 'disk', 0));
    syswrite($socket, pack('NnnQ>Q>N', 0x25609513, 0, $type, 42, 0, $length));
    my (undef, undef, undef, undef, $n) = unpack('NnnQ>N', $take->(20));
    return $n ? $take->($n) : '';
}

sub block_status_words ($server) { return unpack('N*', one_chunk($server, 7, 8 * $MiB)) }
sub read_payload ($server, $length) { return one_chunk($server, 0, $length) }

subtest 'ending' => sub {
    my $server = start();
    my ($pid, $dir) = ($server->pid, $server->dir);
    my $child = fork() // die "cannot fork: $!\n";
    if (!$child) {
        undef($server);
        POSIX::_exit(0);
    }
    waitpid($child, 0);
    ok($server->running, 'the server survives the exit of a forked child');
    undef($server);
    ok(!kill(0, $pid), 'no process left');
    ok(!-e $dir, 'no directory left');
};

done_testing();
