# pve-backup-access serve and mount, without a guest: several readers at the same time get what was backed up,
# and nothing stays behind, however the command ends.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Errno qw(EROFS);
use File::Temp ();
use IO::Handle ();
use JSON::PP ();
use Test::More;
use Time::HiRes qw(sleep time);

use PBA::Test::Chain;
use PBA::Test::Command qw(command run_command start_command);
use PBA::Test::QemuNbd;

my $chain = PBA::Test::Chain->new->add_archives(2);
my ($first, $last) = $chain->names;
my @devices = $chain->devices;
my @ways = ('serve', -e '/dev/fuse' ? 'mount' : ());

# Everything that the command creates is below these directories.
my $tmp = File::Temp->newdir('pba-serve-XXXXXXXX', TMPDIR => 1);
$ENV{TMPDIR} = "$tmp";
my $dir = "$tmp/here";
mkdir($dir) or die "mkdir: $!\n";

sub content ($file) {
    open(my $fh, '<:raw', $file) or return "$file: $!";
    local $/ = undef;
    return scalar(<$fh>);
}

# What a client reads from a place, which is a URI or a file.
sub read_place ($place) {
    return content($place) if $place !~ m/^nbd/;
    my $file = File::Temp->new(DIR => $chain->tmp);
    PBA::Test::QemuNbd::img('convert', '-f', 'raw', '-O', 'raw', $place, "$file");
    return content("$file");
}

# The child processes of the command.
sub children ($command) {
    my $pid = $command->pid;
    return split(' ', content("/proc/$pid/task/$pid/children"));
}

# Starts the command, and returns it with { device => place }.
sub start ($way, $path, @options) {
    my $command = start_command($way, $path, $way eq 'mount' ? $dir : (), @options);
    $command->wait_for(out => qr/^drive-scsi0 .*\n/m);
    my %places = $command->text('out') =~ m/^(\S+) (.*)$/mg;
    return ($command, \%places);
}

# No file, process or mount of those that existed may be left.
sub nothing_left ($text, @pids) {
    my $deadline = time + 30;
    my @files;
    while (1) {
        @files = (
            glob("$dir/*"), glob("$tmp/pba-*"), grep { m!^\S+ \Q$tmp\E/! }
                split(m/^/, content('/proc/self/mounts'))
        );
        last if time > $deadline || !@files && !grep { kill(0 => $_) } @pids;
        sleep(0.05);
    }
    is_deeply(\@files, [], "$text: no file or mount is left");
    is_deeply([grep { kill(0 => $_) } @pids], [], "$text: no process is left");
}

for my $way (@ways) {
    subtest "$way: content, readers, signals" => sub {
        for my $signal (qw(INT TERM HUP)) {
            my $name = $signal eq 'INT' ? $first : $last;
            my ($command, $places) = start($way, $chain->path_of($name));
            is_deeply([sort keys $places->%*], \@devices, "$signal: a line for each device");
            ok(read_place($places->{$_}) eq $chain->{expected}{$name}{$_}, "$signal: $_")
                for @devices;
            my @pids = children($command);
            cmp_ok(@pids, '>=', @devices, "$signal: the processes are seen");
            $command->kill($signal);
            is_deeply([$command->finish->@{qw(status signal err)}], [0, 0, ''], "$signal: status");
            nothing_left($signal, @pids);
        }
    };

    subtest "$way: one of its processes is killed" => sub {
        my ($command) = start($way, $chain->path_of($last), '--device', 'drive-scsi0');
        my @pids = children($command);
        is(scalar(@pids), $way eq 'mount' ? 2 : 1, 'one device is chosen');
        for my $victim (0 .. $#pids) {
            ($command) = start($way, $chain->path_of($last), '--device', 'drive-scsi0') if $victim;
            @pids = children($command);
            kill(KILL => $pids[$victim]);
            my $run = $command->finish;
            is($run->{status}, 1, "process $victim: exit status");
            like($run->{err}, qr/: device drive-scsi0: its .* has ended unexpectedly/,
                'says which');
            nothing_left("process $victim", @pids);
        }
    };
}

# The kernel ends the processes, even if a client is reading; a later command removes the rest.
subtest 'the command itself is killed' => sub {
    for my $way (@ways) {
        my ($command, $places) = start($way, $chain->path_of($last));
        my @pids = children($command);
        my $client = open_volume($way, $places->{'drive-scsi0'});
        $command->kill('KILL');
        $command->finish;
        sleep(0.05) while grep { kill(0 => $_) } @pids;
        ($command) = start($way, $chain->path_of($last));
        $command->kill('TERM');
        my $run = $command->finish;
        is($run->{status}, 0, "$way: the next one works") or diag($run->{err}, $run->{signal});
        nothing_left($way, @pids);
    }
};

# A client that stays connected.
sub open_volume ($way, $place) {
    return PVE::BackupAccess::Volume->open('image', { 'nbd-path' => $place }) if $way eq 'serve';
    open(my $fh, '<', $place) or die "$place: $!\n";
    return $fh;
}

subtest 'several readers, and the same archive twice' => sub {
    my ($one, $places) = start('serve', $chain->path_of($last));
    my ($two, $others) = start($ways[-1], $chain->store . '/100');
    my @clients = map { open_volume('serve', $places->{'drive-scsi0'}) } 1 .. 3;
    ok(read_place($_->{'drive-scsi0'}) eq $chain->{expected}{$last}{'drive-scsi0'}, 'the content')
        for $places, $others;
    is(system("nbdinfo '$places->{'drive-scsi0'}' | grep -q 'is_read_only: true'"), 0, 'read-only');
    like(
        run_command('remove', $chain->path_of($first))->{err},
        qr{is in use by a verify, .* - try again},
        'no archive is removed at this time'
    );
    $_->kill('TERM') for $one, $two;
    is($_->finish->{status}, 0, 'ends while others are connected') for $one, $two;
    undef(@clients);
    nothing_left('both commands have ended');
};

# Starts the command with an output that is full, so it waits before it waits for a signal.
sub start_blocked (@arguments) {
    pipe(my $out, my $in) or die "pipe: $!\n";
    $in->blocking(0);
    1 while syswrite($in, ' ' x 4096);
    1 while syswrite($in, ' ');
    $in->blocking(1);
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        open(STDOUT, '>&', $in) or die "open: $!\n";
        exec(command(@arguments));
    }
    close($in);
    return ($pid, $out);
}

# systemd ends all processes of a service at once.
subtest 'its processes are ended with it' => sub {
    for my $way (@ways) {
        my ($pid, $out) = start_blocked($way, $chain->path_of($last), $way eq 'mount' ? $dir : ());
        my $count = $way eq 'mount' ? 2 * @devices : @devices;
        my @pids;
        for (1 .. 1200) {
            @pids = split(' ', content("/proc/$pid/task/$pid/children"));
            last if @pids == $count && content("/proc/$pid/wchan") =~ m/pipe/;
            sleep(0.05);
        }
        is(scalar(@pids), $count, "$way: all processes run");
        kill(TERM => $pid, @pids);
        sleep(1);
        1 while sysread($out, my $dropped, 65536);
        waitpid($pid, 0);
        is($?, 0, "$way: the exit status is that of a regular end");
        nothing_left($way, @pids);
    }
};

subtest 'under nohup' => sub {
    for my $way (@ways) {
        local $PBA::Test::Command::hangup = 'IGNORE';
        my ($command, $places) = start($way, $chain->path_of($last));
        $command->kill('HUP');
        ok(read_place($places->{'drive-scsi0'}) eq $chain->{expected}{$last}{'drive-scsi0'},
            "$way: a hangup does not end the command");
        ok($command->goes_on, "$way: it still runs");
        $command->kill('TERM');
        is($command->finish->{status}, 0, "$way: another signal does");
        nothing_left("$way under nohup");
    }
};

subtest 'a directory for the sockets' => sub {
    my @options = ('--socket-dir', $dir, '--json');
    my @serve = ('serve', $chain->path_of($last), @options);
    my $mask = umask(0);
    my $command = start_command(@serve);
    $command->wait_for(out => qr/^\}\n/m);
    umask($mask);
    my @public = grep { (stat)[2] & 0077 } glob("$dir/*.sock");
    is_deeply(\@public, [], 'only the owner can use the sockets, whatever the umask is');
    is_deeply(
        JSON::PP->new->decode($command->text('out')),
        { devices => { map { $_ => "nbd+unix:///image?socket=$dir/$_.sock" } @devices } },
        'named after the devices'
    );
    my $run = run_command(@serve);
    is($run->{status}, 1, 'a second command with the same sockets fails');
    like(
        $run->{err},
        qr/cannot listen on \Q$dir\E\/\S+[.]sock - Address already in use/,
        'the error says why'
    );
    $command->kill('KILL');
    $command->finish;
    is(scalar(@{ [glob("$dir/*.sock")] }), 2, 'a killed command leaves its sockets');
    $command = start_command(@serve);
    $command->wait_for(out => qr/^\}\n/m);
    $command->kill('TERM');
    is($command->finish->{status}, 0, 'the next command replaces leftover sockets');
    nothing_left('after a killed command');
};

# guestfish accepts only lower-case letters as the scheme of a URI (libguestfs 1.48 to 1.56, options/uri.c); it then
# passes the path as the export's name, and the socket, to QEMU.
subtest 'the documented URI for guestfish' => sub {
    my $text = content("$FindBin::Bin/../doc/operating.md");
    my ($sockets) = $text =~ m/^pve-backup-access serve \S+ --socket-dir (\S+) &$/m;
    my ($scheme, $export, $socket)
        = $text =~ m!^guestfish .*-a '([a-z]{1,8}):///([^?']+)[?]socket=([^']+)'!m;
    is($scheme, 'nbd', 'the scheme');
    my $command = start_command('serve', $chain->path_of($last), '--socket-dir', $dir);
    $command->wait_for(out => qr/^drive-scsi0 .*\n/m);
    my $place = "nbd+unix:///$export?socket=" . $socket =~ s/\A\Q$sockets\E/$dir/r;
    ok(read_place($place) eq $chain->{expected}{$last}{'drive-scsi0'}, 'the export and the socket');
    $command->kill('TERM');
    $command->finish;
    nothing_left('after that');
};

subtest 'refused arguments' => sub {
    my $long = "$tmp/" . 'x' x 90;
    mkdir($long) or die "mkdir: $!\n";
    my %refused = (
        'no such device' => ['serve', $chain->path_of($last), '--device', 'none'],
        'is not a directory' => ['mount', $chain->path_of($last), "$tmp/none"],
        'is not a directory - create' => ['serve', $chain->path_of($last), '--socket-dir', '/none'],
        'is longer than 107 bytes' => ['serve', $chain->path_of($last), '--socket-dir', $long],
    );
    for my $text (sort keys %refused) {
        my $run = run_command($refused{$text}->@*);
        is($run->{status}, 1, "$text: exit status");
        like(
            $run->{err},
            $text eq 'no such device' ? qr/has no device none/ : qr/$text/,
            'the error says why'
        );
    }
    nothing_left('after the errors');
};

subtest 'a mounted file is opened for writing' => sub {
    plan(skip_all => 'no /dev/fuse: nothing is mounted') if !-e '/dev/fuse';
    my ($command, $places) = start('mount', $chain->path_of($last));
    for my $file (values $places->%*) {
        ok(!open(my $fh, '+<', $file), "$file: refused");
        is($! + 0, EROFS, 'since it is read-only');
    }
    $command->kill('TERM');
    is($command->finish->{status}, 0, 'exit status');
    nothing_left('after that');
};

subtest 'a file with the same name exists' => sub {
    plan(skip_all => 'no /dev/fuse: nothing is mounted') if !-e '/dev/fuse';
    my $file = "$dir/drive-scsi0.raw";
    open(my $fh, '>', $file) or die "$file: $!\n";
    print {$fh} 'mine';
    close($fh);
    my $run = run_command('mount', $chain->path_of($last), $dir);
    is($run->{status}, 1, 'exit status');
    like($run->{err}, qr/cannot make '\Q$file\E' - File exists/, 'the error says why');
    is(content($file), 'mine', 'the existing file is unchanged');
    unlink($file);
    nothing_left('after the refused mount');
};

done_testing;
