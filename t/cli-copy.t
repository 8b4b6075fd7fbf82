# pve-backup-access copy and regions, which do what Volume->copy does for programs in any language.
#
# One QEMU is enough: they read from an NBD server or a file.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Digest::SHA qw(sha256);
use Errno qw(EIO);
use Fcntl qw(F_SETFD);
use File::Temp ();
use JSON::PP ();
use List::Util qw(min);
use Test::More;

use PBA::Test::Command qw(command run_command start_command start_on_terminal);
use PBA::Test::CopySource qw($image $odd_size %maps start write_file read_file same);
use PBA::Test::NBDServer qw(pattern);

my $KiB = 1 << 10;
my $MiB = 1 << 20;
my $dir = File::Temp->newdir('pba-cli-copy-XXXXXXXX', TMPDIR => 1);
my $json = JSON::PP->new->utf8->canonical;
my $python = "$FindBin::Bin/../examples/any-language/store.py";
my @device = ('--device', 'disk');

sub volume_of ($server, $mode = 'reuse', %more) {
    my %bitmap = $mode eq 'none' ? () : ('bitmap-name' => 'bitmap0');
    return $json->encode(
        {
            size => $odd_size,
            'nbd-path' => $server->socket_path,
            'bitmap-mode' => $mode,
            %bitmap, %more
        }
    );
}

sub lines ($text) {
    return map { $json->decode($_) } split(m/\n/, $text);
}

# The parts of the image that are in the map, on top of a base of 0xee.
sub expected ($map) {
    my $data = "\xee" x $odd_size;
    substr($data, $_->[0], $_->[1]) = substr($image, $_->[0], $_->[1]) for $map->@*;
    return $data;
}

# Copies with standard output in a file, because it is large: { status, data, err, lines of the status
# descriptor }.
sub copy_to_file ($volume, @options) {
    pipe(my $out, my $end) or die "pipe: $!\n";
    fcntl($end, F_SETFD, 0);
    my $run = start_command('copy', '-', @device, '--volume', $volume, '--status-fd', fileno($end),
        @options);
    close($end);
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        local $/ = undef;
        write_file("$dir/status", scalar(readline($out)) // '');
        POSIX::_exit(0);
    }
    my $result = $run->finish;
    waitpid($pid, 0);
    return { $result->%*, lines => [lines(read_file("$dir/status"))] };
}

# Parses a stream as documented: [kind, offset, length, data] of each frame except the last. Dies if the stream
# is not complete.
sub read_stream ($bytes) {
    my ($headers, @frames, $sum) = ('');
    for (my $at = 0;;) {
        my $header = substr($bytes, $at, 56);
        die "cut\n" if length($header) < 56;
        my ($kind, $offset, $length, $digest) = unpack('Z8 Q> Q> a32', $header);
        $at += 56;
        if ($kind eq 'end') {
            die "behind the end\n" if $at != length($bytes);
            die "incomplete\n"
                if $offset != @frames - 1
                || $length != ($sum // 0)
                || $digest ne sha256($headers);
            return @frames;
        }
        $headers .= $header;
        my $data = $kind eq 'data' ? substr($bytes, $at, $length) : '';
        die "cut\n" if $kind eq 'data' && length($data) < $length;
        $at += length($data);
        $data = "\0" x $length if $kind eq 'zero';
        die "digest\n" if $kind =~ m/data|zero/ && $digest ne sha256($data);
        $sum += $length if $kind =~ m/data|zero/;
        push(@frames, [$kind, $offset, $length, $data]);
    }
}

# The image that results from a stream and a base.
sub apply ($bytes) {
    my ($first, @frames) = read_stream($bytes);
    my $data = "\xee" x $first->[2];
    substr($data, $_->[1], $_->[2]) = $_->[3] for @frames;
    return $data;
}

my %whole = map { $_ => $maps{$_} } 'one region', 'all', 'nothing', 'every other cluster',
    'the odd end', 'long and short';

subtest 'a stream' => sub {
    for my $name (sort keys %whole) {
        my $server = start(dirty => $maps{$name});
        my $run = copy_to_file(volume_of($server));
        is($run->{status}, 0, "$name: done") or diag($run->{err});
        same(apply($run->{out}), expected($maps{$name}), "$name: the data");
        my ($first, @frames) = read_stream($run->{out});
        is_deeply([$first->@[0 .. 2]], ['part', 1, $odd_size], "$name: the first frame");
        is_deeply([grep { $_->[1] % 65536 || $_->[2] > 65536 } @frames], [], "$name: blocks");
        my @offsets = map { $_->[1] } @frames;
        is_deeply(\@offsets, [sort { $a <=> $b } @offsets], "$name: ascending");
        my $result = $run->{lines}[-1];
        is($result->{type}, 'result', "$name: the result");
        my $bytes = 0;
        $bytes += $_->[1] for $maps{$name}->@*;
        is($result->{'bytes-read'}, $bytes, "$name: the number of bytes read");
        my $progress = $run->{lines}[-2];
        is_deeply(
            $progress,
            { type => 'progress', done => $bytes, total => $bytes },
            "$name: progress"
        ) if $bytes;
        is(
            $result->{'bytes-discarded'},
            (grep { 1 } $server->requests('trim')) ? $bytes - $bytes % 65536 : 0,
            "$name: discarded"
        ) if $name ne 'the odd end' && $name ne 'all';
    }
    my $run
        = copy_to_file(volume_of(start(dirty => $maps{'small blocks'})), '--digest-block', '4K');
    same(apply($run->{out}), expected($maps{'small blocks'}), 'small blocks');
    my $full = copy_to_file(volume_of(start(dirty_only => 0), 'none'));
    is((read_stream($full->{out}))[0][0], 'full', "the stream of a full copy begins with 'full'");
    same(apply($full->{out}), $image, 'a full stream contains the whole image');
};

# Truncated and otherwise damaged streams.
sub damaged ($bytes, $first) {
    my ($without, $other) = ($bytes, $bytes);
    substr($without, 56, 56 + ($first->[0] eq 'data' ? $first->[2] : 0)) = '';
    substr($other, 56 + 56 + 100, 1) ^.= "\1";
    return (
        empty => '',
        'cut before the end' => substr($bytes, 0, -56),
        'cut in a header' => substr($bytes, 0, -1),
        'cut in a block' => substr($bytes, 0, 56 + 56 + 100),
        'a frame is missing' => $without,
        'another byte' => $other,
        'nothing but an end' => pack('a8 Q> Q> a32', 'end', 0, 0, sha256('')),
        'no first frame' => pack('a8 Q> Q> a32', 'zero', 0, 65536, ''),
    );
}

# The wait status of store.py with that stream.
sub given_to_python ($content) {
    mkdir("$dir/store");
    write_file("$dir/base", pack('Q>', $odd_size) . ("\0" x (32 * 97)));
    write_file("$dir/fake.stream", $content);
    write_file("$dir/fake", "#!/bin/sh\ncat '$dir/fake.stream'\n");
    chmod(0755, "$dir/fake");
    unlink("$dir/i");
    my @arguments = ("$dir/store", "$dir/i", "$dir/base", 'disk', "'{}'", "''", "$dir/fake");
    return system("$python backup @arguments 2>$dir/err");
}

subtest 'truncated and changed streams' => sub {
    my $bytes = copy_to_file(volume_of(start(dirty => $maps{'every other cluster'})))->{out};
    my ($head, @frames) = read_stream($bytes);
    my @at = (0, 1, 55, 56);
    my $place = 56;
    for my $frame (@frames) {
        $place += 56 + ($frame->[0] eq 'data' ? $frame->[2] : 0);
        push(@at, $place - 1, $place, $place + 1);
    }
    my @taken = grep {
        my $part = substr($bytes, 0, $_);
        eval { read_stream($part); 1 }
    } @at;
    is_deeply(\@taken, [], 'store.py accepts no incomplete stream');
    is(given_to_python($bytes), 0, 'store.py: a whole one') or diag(read_file("$dir/err"));
    my @open = grep { (stat)[2] & 077 } "$dir/i", glob("$dir/store/*"), glob("$dir/store/*/*/*");
    is_deeply(\@open, [], 'store.py: nobody else can read it');
    my %bad = damaged($bytes, $frames[0]);
    for my $name (sort keys %bad) {
        ok(!eval { read_stream($bad{$name}); 1 }, "$name: is seen");
        isnt(given_to_python($bad{$name}), 0, "$name: store.py detects the damage");
        ok(!-e "$dir/i", "$name: store.py stores no index");
        like(read_file("$dir/err"), qr/\Astore\.py: [^\n]+\n\z/, "$name: store.py prints one line");
    }
};

subtest 'other targets' => sub {
    my $map = $maps{'long and short'};
    my $no_name = volume_of(start(dirty_only => 0), 'none', 'bitmap-name' => undef);
    is(run_command('copy', "$dir/whole", @device, '--volume', $no_name)->{status},
        0, 'a bitmap-name of null, as Proxmox VE has it');
    write_file("$dir/target", "\xee" x $odd_size);
    my $run
        = run_command('copy', "$dir/target", @device, '--volume', volume_of(start(dirty => $map)));
    is($run->{status}, 0, 'a path: done') or diag($run->{err});
    same(read_file("$dir/target"), expected($map), 'a path: the data');
    my @lines = lines($run->{out});
    is($lines[-1]{type}, 'result', 'a path: the result is on standard output');
    my $to = PBA::Test::NBDServer->start(size => $odd_size, keep => 1, export => 'to');
    my $uri = 'nbd+unix:///to?socket=' . $to->socket_path;
    $run = run_command('copy', $uri, @device, '--volume', volume_of(start(dirty => $map)));
    is($run->{status}, 0, 'an NBD URI: done') or diag($run->{err});
    same($to->content, expected($map), 'an NBD URI: the data');
    my $server = start(dirty => $map);
    $run = run_command('copy', "$dir/target", @device, '--volume', volume_of($server),
        '--no-discard');
    is(scalar($server->requests('trim')), 0, '--no-discard');
    my $refused = run_command('copy', "$dir/new", @device, '--volume', volume_of($server));
    is($refused->{status}, 1, 'an increment needs its base');
    $run = run_command('copy', "$dir/new", @device, '--volume', volume_of($server),
        '--without-base');
    is($run->{status}, 0, '--without-base');
};

# Descriptors of the file and of a file with lines, as a program gives them; they are inherited.
sub handle_volume ($lines, $mode = 'reuse') {
    open(my $file, '+<:raw', "$dir/disk") or die "$dir/disk: $!\n";
    write_file("$dir/lines", $lines);
    open(my $regions, '<', "$dir/lines") or die "$dir/lines: $!\n";
    fcntl($_, F_SETFD, 0) for $file, $regions;
    my %volume = (
        size => $odd_size,
        'bitmap-mode' => $mode,
        'file-handle' => fileno($file),
        'next-dirty-region' => fileno($regions),
    );
    return ($json->encode(\%volume), $file, $regions);
}

subtest 'regions, and the mechanism file-handle' => sub {
    my $map = $maps{'every other cluster'};
    my $run = run_command('regions', @device, '--volume', volume_of(start(dirty => $map)));
    is($run->{status}, 0, 'regions: done') or diag($run->{err});
    my @lines = lines($run->{out});
    is_deeply(pop(@lines), { end => $JSON::PP::true, regions => 48, bytes => 48 * 64 * $KiB },
        'the end');
    is_deeply([map { [$_->@{qw(offset length)}] } @lines], $map, 'the lines of the regions');

    write_file("$dir/disk", $image);
    my ($volume, @handles) = handle_volume($run->{out});
    my $copied = copy_to_file($volume);
    is($copied->{status}, 0, 'file-handle: done') or diag($copied->{err});
    same(apply($copied->{out}), expected($map), 'file-handle: the data');
    write_file("$dir/disk", $image);
    ($volume, @handles) = handle_volume($run->{out});
    is(run_command('regions', @device, '--volume', $volume)->{out},
        $run->{out}, 'regions of a file handle');
    my $none = run_command('regions', @device, '--volume', volume_of(start(dirty => [])));
    is($none->{out}, qq({"end":true,"regions":0,"bytes":0}\n), 'a volume without dirty regions');

    for my $case (
        [$run->{out} =~ s/[^\n]+\n\z//r, qr/the regions end after 48, without an end mark/],
        ['', qr/the regions end after 0/],
        [qq({"offset":0,"length":65536}), qr/line 1 of the regions is not valid/],
        [qq({"offset":0,"length":65536}\n0 1\n), qr/line 2 of the regions is not valid/],
        [qq({"offset":65536,"length":65536}\n{"offset":0,"length":65536}\n{"end":true}\n), qr/./],
        [qq({"offset":0,"length":99999999999999999999}\n{"end":true}\n), qr/./],
        )
    {
        my ($lines, $problem) = $case->@*;
        ($volume, @handles) = handle_volume($lines);
        my $bad = copy_to_file($volume);
        is($bad->{status}, 1, "regions '" . substr($lines, -30) =~ s/\n/ /gr . "': an error");
        like($bad->{err}, qr/\Apve-backup-access copy: [^\n]*$problem[^\n]*\n\z/, 'one line');
        ok(!eval { read_stream($bad->{out}); 1 }, 'the stream is not complete');
    }
};

subtest 'failures' => sub {
    my %faults = (
        'a read' => { read_error => EIO },
        'the map' => { block_status_error => EIO },
        'the connection' => { disconnect_at => 3 * $MiB },
    );
    for my $name (sort keys %faults) {
        my $server = start(dirty => $maps{all}, $faults{$name}->%*);
        my $run = copy_to_file(volume_of($server));
        is($run->{status}, 1, "$name: exit status");
        like($run->{err}, qr/\Apve-backup-access copy: device disk: [^\n]+\n\z/, "$name: a line");
        ok(!eval { read_stream($run->{out}); 1 }, "$name: the stream is not complete");
        my $last = $run->{lines}[-1];
        is($last->{type}, 'error', "$name: the last status line");
        like($last->{message}, qr/\Adevice disk: /, "$name: says what");
        ok($last->{class}, "$name: the error's class");
        next if $name eq 'a read';
        $run = run_command('regions', @device, '--volume',
            volume_of(start(dirty => $maps{all}, block_status_error => EIO)));
        is($run->{status}, 1, "$name: regions");
        unlike($run->{out}, qr/end/, "$name: regions: no end");
    }
    my $run
        = start_command('copy', '-', @device, '--volume', volume_of(start(dirty => $maps{all})));
    $run->close_output('out');
    is($run->finish->{signal}, 13, 'nobody reads: SIGPIPE');
    $run = start_command('copy', '-', @device, '--volume',
        volume_of(start(dirty => $maps{all}, hang_at => 4 * $MiB)));
    $run->wait_for('out', qr{part});
    $run->kill('TERM');
    my $killed = $run->finish;
    is($killed->{signal}, 15, 'SIGTERM');
    ok(!eval { read_stream($killed->{out}); 1 }, 'SIGTERM: the stream is not complete');
};

subtest 'a status descriptor that is full' => sub {
    open(my $full, '>', '/dev/full') or die "/dev/full: $!\n";
    fcntl($full, F_SETFD, 0);
    my $run
        = run_command('copy', "$dir/new", @device, '--volume',
        volume_of(start(dirty_only => 0), 'none'),
        '--status-fd', fileno($full));
    is($run->{status}, 1, 'a full status descriptor');
    like(
        $run->{err},
        qr/\A[^\n]*cannot write to the status descriptor: No space left on device\n\z/,
        'a full status descriptor: one line'
    );
};

# A wrong descriptor, such as that of the disk, is not read to its end.
subtest 'invalid lines and invalid JSON' => sub {
    write_file("$dir/disk", $image);
    my $long = '0' x (8 * $MiB);
    my ($volume, @handles) = handle_volume($long);
    my $run = copy_to_file($volume);
    like($run->{err}, qr/line 1 of the regions is not valid/, 'an endless line');
    cmp_ok(sysseek($handles[1], 0, 1), '<=', $MiB, 'an endless line: little of it is read');
    write_file("$dir/long", $long);
    my $command = join(' ', map { "'$_'" } command(), 'regions', @device);
    my $said = qx($command --volume - < $dir/long 2>&1 > /dev/null);
    like($said, qr/--volume: standard input has more than 1048576 bytes/, 'endless JSON');
    $said = qx($command --volume - <&- 2>&1 > /dev/null);
    like($said, qr/\A[^\n]*--volume[^\n]*\n[^\n]*\n\z/, 'standard input is closed');
};

subtest 'unknown and unset members' => sub {
    my $server = start(dirty => $maps{all});
    for my $more ({ future => { a => 1 } }, { 'file-handle' => undef }) {
        my $run
            = run_command('regions', @device, '--volume', volume_of($server, 'reuse', $more->%*));
        is($run->{status}, 0, (keys $more->%*)[0]) or diag($run->{err});
    }
};

# The expected exit status and message, the volume, and options.
sub bad_calls ($server) {
    my $good = volume_of($server);
    my $several = $json->encode({ disk => $json->decode($good) });
    return (
        [1, qr/unknown bitmap-mode 'use'/, volume_of($server, 'use')],
        [1, qr/lacks 'nbd-path'/, '{}'],
        [1, qr/bytes instead of 4096/, volume_of($server, 'reuse', size => 4096)],
        [1, qr/size/, volume_of($server, 'reuse', size => -1)],
        [1, qr/size/, volume_of($server, 'reuse', size => [1])],
        [1, qr/cannot connect|No such file/, '{"nbd-path":"/nonexistent"}'],
        [1, qr/nbd-path/, '{"nbd-path":true}'],
        [1, qr/nbd-path/, '{"nbd-path":"\u0000"}'],
        [2, qr/--volume is not JSON/, '{'],
        [2, qr/--volume is not JSON/, "\xff"],
        [2, qr/--volume must be the JSON object/, '[]'],
        [2, qr/--volume must be the JSON object/, 'null'],
        [2, qr/several devices - give the JSON object of one of them: disk/, $several],
        [2, qr/'file-handle' of --volume must be the number/, '{"file-handle":"x"}'],
        [2, qr/'file-handle' of --volume: descriptor 99 /, '{"file-handle":99}'],
        [2, qr/'next-dirty-region' of --volume must be/, '{"file-handle":0}'],
        [2, qr/--status-fd must be/, $good, '--status-fd', 'x'],
        [2, qr/--status-fd: descriptor 99 /, $good, '--status-fd', 99],
        [2, qr/--status-fd 1 is standard output/, $good, '--status-fd', 1],
        [2, qr/--digests is not needed for a stream/, $good, '--digests', "$dir/d"],
        [2, qr/--bandwidth-limit must be/, $good, '--bandwidth-limit', 'fast'],
        [1, qr/connections/, $good, '--connections', 99],
        [1, qr/request-size/, $good, '--request-size', 5],
        [1, qr/digest-block/, $good, '--digest-block', 5],
    );
}

subtest 'bad usage' => sub {
    my $server = start();
    for my $case (bad_calls($server)) {
        my ($status, $problem, $volume, @options) = $case->@*;
        my $run = run_command('copy', '-', @device, '--volume', $volume, @options);
        is($run->{status}, $status, "'$volume @options': exit status");
        my $more = $status == 2 ? qr/Try [^\n]+\n/ : qr//;
        like($run->{err}, qr/\Apve-backup-access copy: [^\n]*$problem[^\n]*\n$more\z/, 'one line');
        ok(!eval { read_stream($run->{out}); 1 }, 'the stream is not complete');
    }
    my $run = run_command('copy', "$dir/new", @device, '--volume', '{}x');
    is((lines($run->{out}))[-1]{type}, 'error', 'bad usage is told to the program as well');
    my @terminal = ('copy', '-', @device, '--volume', volume_of($server));
    $run = start_on_terminal(80, @terminal)->finish;
    like($run->{out}, qr/standard output is a terminal/, 'a terminal');
    is($run->{status}, 2, 'a terminal: exit status');
};

done_testing;
