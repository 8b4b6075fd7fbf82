# NBD volumes whose calls are interrupted, that are inherited by other processes, and that end.

use v5.36;

use lib 't/lib';

use Errno ();
use IO::Socket::UNIX ();
use POSIX ();
use Socket qw(AF_UNIX SOCK_NONBLOCK SOCK_STREAM pack_sockaddr_un);
use Test::More;
use Time::HiRes qw(alarm sleep time);

use PBA::Test::HostileNBD;
use PBA::Test::Watchdog;
use PVE::BackupAccess::Volume;

subtest 'a handler that dies' => sub {
    my @few = @blocks[0 .. 7];
    my $volume = open_volume(start(dirty => \@few, max_extents => 2, delay => 0.5));
    my @map;
    dies_by_alarm(sub { push @map, [$volume->next_dirty_region] }, 'the first region');
    push @map, map { [$volume->next_dirty_region] } 1 .. 2;
    dies_by_alarm(sub { push @map, [$volume->next_dirty_region] for 1 .. 8 }, 'some way on');
    my $rest = map_of($volume);
    is_deeply([@map, @$rest], \@few, 'carried on: nothing is lost, nothing comes twice');
    is_deeply([$volume->next_dirty_region], [], 'the map ends after that');
};

subtest 'a handler that dies, everywhere' => sub {
    my $volume = open_volume(start(dirty => \@blocks, max_extents => 5, delay => 0.03));
    my ($deaths, @map) = (0);
    local $SIG{ALRM} = sub { };    # for an alarm that arrives after the eval
    while ($deaths < 2000) {
        my @region;

        # The time increases, because a slow machine would otherwise make no progress.
        Time::HiRes::ualarm((10_000 + 4_000 * ($deaths % 17)) * (1 + $deaths / 50));
        my $done = eval {
            local $SIG{ALRM} = sub { die "alarm\n" };
            @region = $volume->next_dirty_region;
            1;
        };
        my $error = $@;
        Time::HiRes::ualarm(0);
        die $error if !$done && $error ne "alarm\n";

        # The handler may also run after the call, but before the statement has ended.
        push @map, \@region if @region;
        last if $done && !@region;
        $deaths++ if !$done;
    }
    cmp_ok($deaths, '>', 0, "interrupted often ($deaths times)");
    is_deeply(\@map, \@blocks, 'the map is complete');
};

subtest 'a handler that dies while reading' => sub {
    my $server = start(dirty => \@blocks, max_extents => 2, delay => 0.8);
    my $volume = open_volume($server);
    dies_by_alarm(sub { $volume->pread(0, 4 * $MiB) }, 'reading');
    ok($volume->pread(512, 4096) eq pattern(512, 4096), 'another read is right');
    is_deeply([$volume->next_dirty_region], $blocks[0], 'the map, too');
    dies_by_alarm(sub { $volume->pread($MiB, 512) }, 'a read in the middle of the map');
    dies_by_alarm(sub { $volume->discard(0, 64 * $KiB) }, 'discarding');
    is_deeply([map { [$volume->next_dirty_region] } 1 .. 3], [@blocks[1 .. 3]],
        'the map continues');

    my $hangs = open_volume(start(dirty => \@blocks, max_extents => 2, hang_at => 300 * $KiB));
    dies_by_alarm(sub { map_of($hangs) }, 'a server that hangs');
    dies_by_alarm(sub { map_of($hangs) }, 'the next call, too');
};

subtest 'a handler that does not die' => sub {
    my $handled = 0;
    local $SIG{ALRM} = sub { $handled++; Time::HiRes::ualarm(5_000) };
    local $SIG{USR1} = sub {
        eval { die "inner\n" };
        $handled++;
    };
    my $volume = open_volume(start(dirty => \@blocks, max_extents => 3, delay => 0.03));
    Time::HiRes::ualarm(5_000);
    my $map = eval { map_of($volume) };
    my $data = eval { local $@ = 'kept'; $volume->pread(0, 4096) };
    Time::HiRes::ualarm(0);
    is_deeply($map, \@blocks, 'map') or diag($@);
    ok($data eq pattern(0, 4096), 'data');
    cmp_ok($handled, '>', 3, "the handler ran often ($handled times)");
};

subtest 'a handler that uses the volume' => sub {
    my %use = (
        close => sub ($volume) { $volume->close },
        pread => sub ($volume) { $volume->pread(0, 512) },
        next_dirty_region => sub ($volume) { $volume->next_dirty_region },
    );
    for my $name (sort keys %use) {
        my $server = start(dirty => \@blocks, max_extents => 8, delay => 0.1);
        my $code = sub {
            my $volume = open_volume($server);
            local $SIG{ALRM} = sub {
                eval { $use{$name}->($volume) }
            };
            alarm(0.25);
            my $map = eval { map_of($volume) };
            alarm(0);

            # What happens is not defined, as long as an incomplete map is not mistaken for a complete one.
            !$map || @$map == 64;
        };
        is(in_child($code), 0, "$name within a call does no harm");
    }
};

# As QEMU before 9.2 requires, which continues to read for a client that has disconnected.
my @by_cluster = (dirty => \@blocks, description => 'pba: read by clusters of 65536 bytes');
my $refused = qr/\Adevice disk: cannot be used any more.*end the guest.*set it up again\n\z/;

# The volume can be used afterwards if its answers arrived soon enough; otherwise it must be refused. Requests
# never overlap.
sub goes_on_after ($interrupt, $name) {
    my $server = start(@by_cluster, delay => 0.4);
    my $volume = open_volume($server);
    $interrupt->($volume);
    my $done = eval {
        $volume->pread(0, 4096) eq pattern(0, 4096) or die "wrong data\n";
        $volume->copy(to => '/dev/null')->{'bytes-read'} == 64 * 64 * $KiB or die "wrong size\n";
    };
    $done or like($@, $refused, "$name: the volume works or is refused");
    is_deeply([$server->overlapping_reads], [], "$name: nothing is asked for twice at a time");
    return $done;
}

subtest 'a server that must not get overlapping reads' => sub {
    my %interrupt = (
        'a read' => sub ($volume) {
            dies_by_alarm(sub { $volume->pread(0, 4096) }, 'a read');
        },
        'a copy' => sub ($volume) {
            dies_by_alarm(sub { $volume->copy(to => '/dev/null') }, 'a copy');
        },
        'a copy that fails' => sub ($volume) {
            ok(
                !eval {
                    $volume->copy(to => sub { die "full\n" });
                    1;
                },
                'a copy that fails'
            );
        },
    );
    for my $name (sort keys %interrupt) {
        my $tries = 0;
        $tries++ until goes_on_after($interrupt{$name}, $name) || $tries == 4;
        cmp_ok($tries, '<', 4, "$name: then everything can be read");
    }
};

subtest 'the same without an answer' => sub {
    my $server = start(@by_cluster, delay => 3);
    my $volume = open_volume($server);
    my $other = open_volume($server);
    dies_by_alarm(sub { $volume->pread(0, 4096) }, 'a read');
    my %uses = (
        'a read' => sub { $volume->pread(0, 4096) },
        'a copy' => sub { $volume->copy(to => '/dev/null') },
        'another volume' => sub { $other->pread(0, 4096) },
        'a new volume' => sub { open_volume($server) },
    );
    for my $name (sort keys %uses) {
        ok(!eval { $uses{$name}->(); 1 }, "$name dies");
        like($@, $refused, "$name is refused");
    }
    is_deeply([$server->overlapping_reads], [], 'nothing is asked for twice');

    $server = start(dirty => \@blocks, delay => 1);
    $volume = open_volume($server);
    dies_by_alarm(sub { $volume->pread(0, 4096) }, 'a read from any other server');
    ok($volume->pread(0, 4096) eq pattern(0, 4096), 'is asked again');
    is(scalar(() = $server->overlapping_reads), 1, 'the reads overlap once');
};

subtest 'connecting is interrupted' => sub {
    my $listener
        = IO::Socket::UNIX->new(Local => my $path = "/tmp/pba-nbd-interrupted-$$", Listen => 1)
        or die "cannot listen: $!\n";
    my $volume = { 'nbd-path' => $path, size => 512, 'bitmap-mode' => 'none' };
    dies_by_alarm(sub { PVE::BackupAccess::Volume->open('disk', $volume) },
        'a server that sends no greeting');
    unlink($path);
};

# ---- processes, and the end of volumes ----

# The functions of a volume. They get a reference to the test's variable, because tests undefine it between two
# calls.
sub uses_of ($volume) {
    return (
        next_dirty_region => sub { $volume->$*->next_dirty_region },
        dirty_regions => sub { $volume->$*->dirty_regions(3) },
        pread => sub { $volume->$*->pread(0, 512) },
        discard => sub { $volume->$*->discard(0, 64 * $KiB) },
        size => sub { $volume->$*->size },
    );
}

sub dies_as_foreign ($code) {
    return !eval { $code->(); 1 } && error_class($@) eq 'StateError';
}

subtest 'a forked child' => sub {
    my $server = start(dirty => \@blocks, max_extents => 2);
    my $volume = open_volume($server);
    is_deeply([$volume->next_dirty_region], $blocks[0], 'the first region');
    is(in_child(sub { 1 }), 0, 'a child that exits');
    is_deeply([$volume->next_dirty_region], $blocks[1], 'the parent continues');
    my %use = uses_of(\$volume);
    for my $name (sort keys %use) {
        is(in_child(sub { dies_as_foreign($use{$name}) }), 0, "$name in a child dies");
    }
    is(in_child(sub { $volume->close; 1 }), 0, 'a child that closes the volume');
    is(in_child(sub { undef $volume; 1 }), 0, 'a child that drops the volume');
    my $grandchild = sub {
        in_child(sub { dies_as_foreign($use{pread}) }) == 0;
    };
    is(in_child($grandchild), 0, 'a grandchild');
    is_deeply([map { [$volume->next_dirty_region] } 2 .. 63], [@blocks[2 .. 63]], 'the whole map');
    ok($volume->pread(4096, 512) eq pattern(4096, 512), 'data');
    is($server->connections, 1, 'one connection was used for everything');
    is_deeply([$server->requests('trim')], [], 'no child has sent anything');
};

subtest 'a child with its own volume' => sub {
    my $server = start(dirty => \@blocks);
    my $code = sub {
        my $volume = open_volume($server);
        @{ map_of($volume) } == 64;
    };
    is(in_child($code), 0, 'works in the child');
    is_deeply(map_of(open_volume($server)), \@blocks, "the parent's volume works");
};

# If the queue is full, connect() on a Unix socket fails at once with EAGAIN instead of waiting.
subtest 'a queue of connections that is full' => sub {
    my $server = start(dirty => \@blocks);
    kill('STOP', $server->pid);
    my (@waiting, $client);
    while (socket($client, AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0)) {
        connect($client, pack_sockaddr_un($server->socket_path)) or last;
        push(@waiting, $client);
        undef $client;
    }
    ok($!{EAGAIN}, 'it is full') or diag($!);
    for my $path ($server->socket_path, $server->uri) {
        dies_by_alarm(sub { open_volume($server, 'nbd-path' => $path) }, $path);
    }
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        sleep(0.5);
        kill('CONT', $server->pid);
        POSIX::_exit(0);
    }
    my $volume = eval { open_volume($server) };
    is_deeply($volume && map_of($volume), \@blocks, 'is waited for') or diag($@);
    waitpid($pid, 0);
};

subtest 'the end' => sub {
    my $server = start(dirty => \@blocks);
    my $volume = open_volume($server);
    ok(eval { $volume->close; 1 }, 'close');
    $server->wait_for_record('closed');
    ok(eval { $volume->close; 1 }, 'close again');
    my %use = uses_of(\$volume);
    for my $name (sort keys %use) {
        ok(!eval { $use{$name}->(); 1 }, "$name after close dies");
        is(error_class($@), 'StateError', 'class');
    }
    undef $volume;

    $volume = open_volume($server);
    undef $volume;
    $server->wait_for_record('closed', 2);
    pass('letting it go closes the connection');

    my $twice = sub {
        my $object = open_volume($server);
        my $destroy = $object->can('DESTROY') // sub ($object) { };
        $destroy->($object);
        eval { $object->size };
        eval { $object->close };
        eval { $destroy->($object) };
        undef $object;
        1;
    };
    is(in_child($twice), 0, 'DESTROY by hand and again');
    my $in_flight = sub {
        my $object = open_volume(start(dirty => \@blocks, delay => 0.5));
        local $SIG{ALRM} = sub { die "alarm\n" };
        alarm(0.1);
        eval { $object->next_dirty_region };
        alarm(0);
        undef $object;
        1;
    };
    is(in_child($in_flight), 0, 'let go with requests in flight');
};

subtest 'descriptors' => sub {
    my $count = sub { my @fds = glob('/proc/self/fd/*'); return scalar(@fds) };
    my $server = start(dirty => \@blocks);
    open_volume($server)->close;
    my $before = $count->();
    for (1 .. 20) {
        my $volume = open_volume($server);
        $volume->next_dirty_region;
        eval { open_volume($server, size => 1) };
        eval { open_volume($server, 'bitmap-name' => 'x') };
        eval { $volume->pread(0, 1 << 40) };
    }
    is($count->(), $before, 'no connection is left open');
};

done_testing();
