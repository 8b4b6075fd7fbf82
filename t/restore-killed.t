# A restore is killed at each call that changes files. The same restore into the same directory then completes, whatever the
# killed one left, and files that are not of that restore stay.
#
# One QEMU is enough: qemu-img and qemu-nbd only use files.
#
# A plain run tries some of the calls, chosen by a seed; PBA_FULL=1 all of them.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use PBA::Test::Strike qw(strike_at);

use JSON::PP ();
use POSIX ();
use Test::More;

use PBA::Test::Chain;
use PBA::Test::Command qw(run_command);
use PVE::BackupAccess::CLI::Restore;
use PVE::BackupAccess::File qw(fingerprint);

my $seed = 20261130;
srand($seed);
note("seed $seed");

my $chain = PBA::Test::Chain->new->add_archives(1);
my ($name) = $chain->names;
my $path = $chain->path_of($name);
my $dir = $chain->tmp . '/target';
mkdir($dir) or die "mkdir: $!\n";
my $list = "$dir/restore.part";

sub content ($file) {
    open(my $fh, '<:raw', $file) or return "$file: $!";
    local $/ = undef;
    return scalar(<$fh>);
}

sub write_file ($file, $content) {
    open(my $fh, '>', $file) or die "$file: $!\n";
    print {$fh} $content;
    close($fh) or die "$file: $!\n";
    return;
}

# Returns where the restore was killed, undef if it ended before that.
sub killed_at ($number) {
    pipe(my $from, my $to) or die "pipe: $!\n";
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        $ENV{TMPDIR} = $chain->tmp;
        open(STDOUT, '>', '/dev/null') or die "open: $!\n";
        strike_at($number, sub ($where) { syswrite($to, $where); kill(KILL => $$) });
        my $done = eval { PVE::BackupAccess::CLI::Restore::run({ quiet => 1 }, $path, $dir); 1 };
        print {*STDERR} $@ if !$done;
        POSIX::_exit($done ? 0 : 1);
    }
    close($to);
    my $where = readline($from);
    waitpid($pid, 0);
    die "the restore failed\n" if $? && $? != 9;
    return $? ? $where : undef;
}

sub check_data ($text) {
    ok(content("$dir/$_.raw") eq $chain->{expected}{$name}{$_}, "$text: $_") for $chain->devices;
    return;
}

# Restores again, and checks that the directory has what it must have.
sub check_repeat ($text, @options) {
    my $format = @options ? $options[1] : 'raw';
    my $run = run_command('restore', $path, $dir, '-q', @options);
    is($run->{status}, 0, "$text: again") or diag($run->{err});
    is_deeply(
        [sort glob("$dir/*")],
        [sort("$dir/guest.conf", map { "$dir/$_.$format" } $chain->devices)],
        "$text: nothing else is there"
    );
    check_data($text) if $format eq 'raw';
    return;
}

# Killed after its last step.
sub is_complete () {
    return !-e $list && !grep { !-e "$dir/$_.raw" } $chain->devices;
}

subtest 'killed at each call' => sub {
    my $lists = 0;
    for (my $number = 1;; $number++) {
        next if !$ENV{PBA_FULL} && rand() > 0.3;
        my $where = killed_at($number) // last;
        $lists++ if -e $list;
        is_complete()
            ? check_data($where)
            : check_repeat($where, rand() < 0.2 ? ('--format', 'qcow2') : ());
        unlink(glob("$dir/*"));
    }
    cmp_ok($lists, '>', 0, 'some were killed between two names');
    unlink(glob("$dir/*"));
};

# Leaves what a restore leaves that is killed between its first two names.
sub leave () {
    run_command('restore', $path, $dir, '-q');
    my @files = map { s{.*/}{}r } glob("$dir/*");
    write_file($list,
        JSON::PP->new->latin1->encode({ map { $_ => fingerprint("$dir/$_") } @files }));
    rename("$dir/$_", "$dir/$_.part") or die "rename: $!\n" for @files[1 .. $#files];
    return;
}

subtest 'what is not of the killed restore' => sub {
    leave();
    my ($file) = map { "$dir/$_.raw" } $chain->devices;
    ok(-e $file, 'one file has its name');
    write_file($file, 'mine');
    my $run = run_command('restore', $path, $dir, '-q');
    is($run->{status}, 1, 'a file that was changed since: exit status');
    like($run->{err}, qr/\Q$file\E already exists and is not overwritten/, 'the error says why');
    is(content($file), 'mine', 'it stays');
    unlink($file);
    check_repeat('once it is gone');
    unlink(glob("$dir/*"));

    write_file($list, '{"../other":{"size":1,"mtime":"1.000000"},"x');
    check_repeat('a list that is not complete');
    unlink(glob("$dir/*"));
};

subtest 'the list of a restore that runs' => sub {
    open(my $fh, '>', $list) or die "$list: $!\n";
    my $run = run_command('restore', $path, $dir, '-q');
    is($run->{status}, 1, 'exit status');
    like(
        $run->{err},
        qr/another restore to \Q$dir\E is about to be completed/,
        'the error says why'
    );
    ok(-e $list, 'the list stays');
    close($fh);
    check_repeat('after its end');
};

done_testing;
