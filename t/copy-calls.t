# The caller's side of a copy: progress, signals, exceptions, forks, memory, arguments. t/copy.t tests the data.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use List::Util qw(max sum0);
use POSIX ();
use Test::More;
use Time::HiRes qw(time);

use PBA::Test::CopySource qw($image $odd_size %maps start write_file read_file same);
use PBA::Test::Handle;
use PBA::Test::NBDServer qw(open_volume);
use PBA::Test::QemuNbd;
use PBA::Test::VFile;
use PVE::BackupAccess::Volume;

my $KiB = 1 << 10;
my $MiB = 1 << 20;
my $dir = File::Temp->newdir('pba-copy-XXXXXXXX', TMPDIR => 1);

subtest 'progress' => sub {
    for my $map_name (sort keys %maps) {
        my $total = sum0(map { $_->[1] } $maps{$map_name}->@*);
        my @calls;
        my $volume = open_volume(start(dirty => $maps{$map_name}, delay => 0.02));
        $volume->copy(
            to => '/dev/null',
            connections => 1,
            'request-size' => 4 * $KiB,
            progress => sub ($done, $all) { push(@calls, [$done, $all]) },
        );
        is_deeply($calls[-1], [$total, $total], "$map_name: ends at the total");
        is(scalar(grep { $_->[1] != $total } @calls),
            0, "$map_name: every call has the right total");
        is(scalar(grep { $calls[$_][0] < $calls[$_ - 1][0] } 1 .. $#calls),
            0, "$map_name: never falls");
    }
};

# A handler that adds words to the exception is called as often as without this module. Perl itself calls it
# twice if a signal handler dies.
subtest 'a __DIE__ handler' => sub {
    my $calls = 0;
    my $wrap = sub ($text) { die "wrapped: $text" if ++$calls };
    my $thrown = sub (@) {
        local $SIG{__DIE__} = $wrap;
        die "thrown\n";
    };
    my %codes = (
        progress => [to => '/dev/null', progress => $thrown],
        target => [to => $thrown],
        digests => [to => '/dev/null', digests => $thrown],
        signal => [to => '/dev/null', progress => sub (@) { kill('USR1', $$) }],
    );
    local $SIG{USR1} = sub { $thrown->() };
    for my $of (sort keys %codes) {
        local $SIG{__DIE__} = $wrap;
        ok(!eval { $codes{$of}[-1]->(); 1 }, "$of: dies by itself");
        my @plain = ($@, $calls);
        $calls = 0;
        my $volume = open_volume(start(dirty => $maps{all}));
        ok(!eval { $volume->copy($codes{$of}->@*); 1 }, "$of: dies");
        is_deeply([$@, $calls], \@plain, 'the exception arrives unchanged');
        $calls = 0;
    }
};

subtest 'bandwidth limit' => sub {
    my $limit = 400 * $KiB;
    my $volume = open_volume(start(size => 4 * $MiB, dirty => [[0, 4 * $MiB]]));
    my $statistics = $volume->copy(to => '/dev/null', 'bandwidth-limit' => $limit);
    my $expected = 4 * $MiB / $limit;
    cmp_ok($statistics->{seconds}, '>', $expected * 0.95, 'the copy is not faster than the limit');
    cmp_ok($statistics->{seconds}, '<', $expected * 1.5, 'the copy is not much slower');
    is($statistics->{'bytes-discarded'}, 4 * $MiB, 'short reads are discarded by whole clusters');
};

sub hanging_target () {
    state $server = PBA::Test::NBDServer->start(size => $odd_size, hang_write_at => 3 * $MiB);
    return $server;
}

# The server of the file waits for an answer that never comes. It is killed before the interpreter ends.
my $hanging_file;
END { undef $hanging_file }

sub open_hanging_handle () {
    state $server = PBA::Test::NBDServer->start(size => $odd_size, hang_at => 5 * $MiB);
    $hanging_file = PBA::Test::VFile->start(
        socket => $server->socket_path,
        device => $server->{export},
        size => $odd_size,
    );
    my @left = ([0, $odd_size]);
    return PVE::BackupAccess::Volume->open(
        'disk',
        {
            size => $odd_size,
            'bitmap-mode' => 'new',
            'file-handle' => $hanging_file->handle,
            'next-dirty-region' => sub { @left ? shift(@left)->@* : () },
        },
    );
}

# By which factor a busy machine is slower than expected.
sub slowness () {
    open(my $fh, '<', '/proc/loadavg') or return 1;
    my ($load) = split(' ', <$fh>);
    return max(1, $load);
}

subtest 'exceptions' => sub {
    my $object = bless({ reason => 'mine' }, 'My::Exception');
    for my $case (['to', sub { die $object }], ['progress', sub { die $object }]) {
        my ($option, $code) = @$case;
        my $volume = open_volume(start(dirty => $maps{all}));
        ok(!eval { $volume->copy(to => '/dev/null', $option => $code); 1 }, "$option dies");
        is($@, $object, "$option: its exception arrives unchanged");
        same($volume->pread(4096, 4096), substr($image, 4096, 4096),
            "$option: the volume works on");
    }
};

subtest 'signals' => sub {
    my @hangs = (
        [
            'source', sub { open_volume(start(dirty => $maps{all}, hang_at => 5 * $MiB)) },
            "$dir/target"
        ],
        ['target', sub { open_volume(start(dirty => $maps{all})) }, hanging_target()->uri],
        PBA::Test::Handle->missing ? () : ['file handle', \&open_hanging_handle, "$dir/target"],
    );
    for my $case (@hangs) {
        my ($name, $open, $target) = @$case;
        my $volume = $open->();
        my $start = time;
        my $done = eval {
            local $SIG{ALRM} = sub { die "alarm\n" };
            Time::HiRes::alarm(0.5);
            $volume->copy(to => $target, 'without-base' => 1);
            1;
        };
        ok(!$done, "a $name that hangs: the exception of a signal handler ends the copy");
        is($@, "alarm\n", "a $name that hangs: the handler's exception arrives");
        cmp_ok(time - $start, '<', 1.5 * slowness(), "a $name that hangs: within a second");
    }
};

# They would leave the copy half done and without an error.
subtest 'loop controls' => sub {
    for my $option (qw(to progress)) {
        no warnings 'exiting';    ## no critic (ProhibitNoWarnings)
        my @ways = ([last => sub { last }], [next => sub { next }]);
        for my $way (@ways) {
            my ($word, $code) = $way->@*;
            my @seen;
            for my $time (1, 2) {
                my $volume = open_volume(start(dirty => $maps{all}));
                push(@seen, eval { $volume->copy(to => '/dev/null', $option => $code) } // $@);
            }
            is(scalar(@seen), 2, "$word in $option: leaves no loop of the caller's");
            is(scalar(grep { m/\ACan't "$word" outside a loop block/ } @seen), 2, 'it dies');
        }
    }
};

subtest 'the volume in a callback' => sub {
    my $inside;
    my $volume = open_volume(start(dirty => $maps{all}));
    $volume->copy(
        to => sub {
            $inside //= eval { $volume->size; 1 } ? 'usable' : $@;
        }
    );
    like($inside, qr/in use by a call that is under way/,
        'the volume is not for use in a callback');
};

subtest 'forks' => sub {
    my $map = $maps{all};
    for my $how (qw(exits dies returns)) {
        my $volume = open_volume(start(dirty => $map));
        my $file = write_file("$dir/target", "\xee" x $odd_size);
        my ($test, @children) = ($$);
        my $fork = sub (@) {
            return if @children;
            my $pid = fork() // die "cannot fork: $!\n";
            if (!$pid) {
                POSIX::_exit(0) if $how eq 'exits';
                die "child\n" if $how eq 'dies';
                return;
            }
            push(@children, $pid);
        };
        my $statistics
            = eval { $volume->copy(to => $file, 'without-base' => 1, progress => $fork) };
        if ($$ != $test) {
            my $expected = $how eq 'dies' ? qr/\Achild\n\z/ : qr/belongs to another process/;
            undef $volume;
            POSIX::_exit($@ =~ $expected ? 0 : 1);
        }
        is($@, '', "a child that $how: the copy in the parent continues");
        waitpid($_, 0) for @children;
        is($?, 0, "a child that $how: the exit status");
        same(read_file($file), $image, "a child that $how: data");
    }
};

subtest 'bounded memory' => sub {
    my $server = start(size => 1 << 30, dirty => [[0, 1 << 30]], data => sub ($, $n) { 'x' x $n });
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        my $volume = open_volume($server);
        my $before = peak_kib();
        $volume->copy(to => '/dev/null', 'request-size' => 8 * $MiB);
        my $grown = peak_kib() - $before;
        POSIX::_exit($grown <= 64 * 1024 ? 0 : 1);
    }
    waitpid($pid, 0);
    is($?, 0, 'memory is at most 64 MiB with the longest requests');
};

sub peak_kib () {
    my ($kib) = map { m/^VmHWM:\s+(\d+)/ } split(/^/, read_file('/proc/self/status'));
    return $kib;
}

# A plain run has a quarter of a million.
subtest 'a million regions' => sub {
    my $regions = 1 << ($ENV{PBA_FULL} ? 20 : 18);
    my $size = $regions << 10;
    my $file = "$dir/map.qcow2";
    PBA::Test::QemuNbd::write_map(
        file => $file,
        size => $size,
        granularity => 512,
        bitmap => 'bitmap0',
        pattern => 'alternate',
    );
    my $server = PBA::Test::QemuNbd->start(
        file => $file,
        format => 'qcow2',
        bitmap => 'bitmap0',
        readonly => 1,
    );
    my $volume
        = PVE::BackupAccess::Volume->open('disk',
        { 'nbd-path' => $server->uri, 'bitmap-name' => 'bitmap0' },
        );
    my ($total, $calls) = (0, 0);
    my $statistics = $volume->copy(
        to => "$dir/target",
        'without-base' => 1,
        progress => sub ($done, $all) { $total = $all; $calls++ },
    );
    is($statistics->{regions}, $regions, 'regions');
    is($statistics->{'bytes-read'}, $size / 2, 'bytes');
    is($total, $size / 2, 'progress');
    cmp_ok(
        $calls, '<=',
        $statistics->{seconds} * 5 + 2,
        'progress is reported at most five times a second'
    );
};

sub refused (@cases) {
    my $volume = open_volume(start(dirty => $maps{all}));
    for my $case (@cases) {
        my ($pattern, @options) = @$case;
        ok(!eval { $volume->copy(@options); 1 }, "refused: $pattern");
        like($@, qr/$pattern.*\n\z/, 'the error message');
    }
    is_deeply([$volume->next_dirty_region], [0, $odd_size], 'the volume was not touched');
    return;
}

subtest 'invalid targets' => sub {
    open(my $reader, '<', '/dev/null') or die;
    open(my $appender, '>>', "$dir/appended") or die;
    open(my $closed, '<', '/dev/null') or die;
    close($closed);
    refused(
        [qr/copy needs the option 'to'/],
        [qr/copy needs the option 'to'/, to => undef],
        [qr/to must not be empty/, to => ''],
        [qr/must be open for writing, not for reading/, to => $reader],
        [qr/must be open for writing, not for appending/, to => $appender],
        [qr/must be a handle that is open/, to => $closed],
        [qr/must be a handle that is open/, to => {}],
        [qr/cannot write to the file descriptor 987 - Bad file/, to => 987],
        [qr/cannot write to .*Is a directory/, to => "$dir"],
        [qr/cannot write to .*No such file/, to => "$dir/none/target", 'without-base' => 1],
        [qr/connecting failed.*nothing-here/, to => "nbd+unix:///x?socket=$dir/nothing-here"],
    );
};

subtest 'arguments' => sub {
    refused(
        [qr/unknown option 'speed'/, to => '/dev/null', speed => 1],
        [qr/bandwidth-limit must be/, to => '/dev/null', 'bandwidth-limit' => -1],
        [qr/bandwidth-limit must be/, to => '/dev/null', 'bandwidth-limit' => '1M'],
        [qr/connections must be/, to => '/dev/null', connections => 17],
        [qr/request-size must be/, to => '/dev/null', 'request-size' => 16 * $MiB],
        [qr/request-size must be a multiple of 4096/, to => '/dev/null', 'request-size' => 5000],
        [qr/digest-block must be from/, to => '/dev/null', digests => 'x', 'digest-block' => 512],
        [
            qr/digest-block must be a power/,
            to => '/dev/null',
            digests => 'x',
            'digest-block' => 12288
        ],
        [qr/digest-block needs digests/, to => '/dev/null', 'digest-block' => 4096],
        [qr/only-known needs expected/, to => '/dev/null', 'only-known' => 1],
        [qr/expected must be a list/, to => '/dev/null', expected => []],
        [qr/expected must not be empty/, to => '/dev/null', expected => ['']],
        [qr/damaged must be/, to => '/dev/null', expected => ['x'], damaged => 1],
        [qr/digests must/, to => '/dev/null', digests => ''],
        [qr/progress must be a code ref/, to => '/dev/null', progress => 1],
        [qr/discard must be 0 or 1/, to => '/dev/null', discard => 'no'],
    );
};

done_testing;
