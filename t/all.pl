# Runs the tests for ./run test: all of them on the machine's QEMU, those that start a virtual machine also on a
# newer QEMU from a private prefix, and with them the gates and the sanitizers' part. A skip that is not
# expected is a failure.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use JSON::PP ();
use List::Util qw(shuffle);
use TAP::Harness;

use PBA::Test::Cache;

my $Cache = 'PBA::Test::Cache';
my $seed = $ENV{PBA_SEED} // time();

# Reasons to skip that are legitimate on some machines; any other skip would hide a fault.
my @expected_skips = (
    qr/\Ano \/dev\/fuse\b/,
    qr/\Ano (?:Go compiler|libvirt|mount namespaces)\b/,
    qr/\Aneeds root\b/,
    qr/\Aneeds QEMU 10\.0 or later\b/,
    qr/\Aneeds the tools of Debian 12\b/,
    qr/\Aneeds Ceph\b/,
    qr/\Aneeds PBA_FULL\b/,
    qr/\Aneeds PBA_(?:QEMU_SERVER|PVE_CONTAINER)\b/,
    qr/\Aneeds Proxmox VE's (?:backup provider API|storage)\b/,
    qr/\Aonly for QEMU before 10\.0\b/,
    qr/\Aonly for a stock QEMU\b/,
    qr/\Anot on a QEMU with Proxmox' commands\b/,
);

# Other programs that print TAP. They check the files that git knows, so they are only run in a git checkout,
# and not if tests are named.
my @programs = ('t/check.pl --quick', 't/deb.pl --test',
    't/asan.pl t/nbd-block-sizes.t t/qmp-early-form.t',);
my @valgrind = map { "t/valgrind.pl $_" } qw(t/args.t t/handle.t t/qmp-code-ref.t);

# These take more than a minute.
my %is_long = map { ("t/$_.t" => 1) }
    qw(audit cli cli-archives cli-try-provider copy-guest crash-points
    cycles doc-code harness persistent qcow2-chain qcow2-chain-content qcow2-chain-faults rbd
    store-life);

my @unexpected;

sub content ($file) {
    open(my $fh, '<', $file) or die "$file: $!\n";
    local $/;
    return scalar(<$fh>);
}

sub starts_vm ($file) {
    return -e $file && content($file) =~ m/PBA::Test::(?:VM|Backend|Front)\b/;
}

# If a second QEMU adds nothing to a test, the test says so and why.
sub one_is_enough ($file) {
    return !$ENV{PBA_FULL} && content($file) =~ m/^# One QEMU is enough: \S/m;
}

# A plain run of everything includes only a part of what is run in a second way, chosen by the seed.
sub share ($part, @all) {
    return @all if $ENV{PBA_FULL} || @ARGV;
    srand($seed);
    my @some = shuffle(@all);
    return sort @some[0 .. int($part * $#all)];
}

# [{ file, name, environment }]
sub jobs_for (@files) {
    my @jobs = map { { file => $_, name => $_, environment => {} } } @files;
    my @vm_files = grep { starts_vm($_) } @files;
    return \@jobs if !@vm_files;
    $Cache->prepare;
    return \@jobs if $ENV{PBA_QEMU} || !$Cache->has_qemu10;
    my %newer = $Cache->qemu10_env;
    push(@jobs,
        map { { file => $_, name => "$_ on QEMU 10.0", environment => \%newer } }
            share(1 / 3, grep { !one_is_enough($_) } @vm_files));
    return \@jobs;
}

# ---- the longest tests first, so that none of them is still running alone at the end ----

my $times_file = $Cache->directory . '/times.json';

sub known_times () {
    return eval { JSON::PP->new->decode(content($times_file)) } // {};
}

sub by_time ($times, @jobs) {
    my %seconds
        = map { $_->{name} => $times->{ $_->{name} } // ($is_long{ $_->{file} } ? 100 : 30) } @jobs;
    return sort { $seconds{ $b->{name} } <=> $seconds{ $a->{name} } } @jobs;
}

sub remember_times ($times) {
    open(my $fh, '>', "$times_file.$$") or die "$times_file.$$: $!\n";
    print {$fh} JSON::PP->new->canonical->encode($times);
    close($fh) or die "$times_file.$$: $!\n";
    rename("$times_file.$$", $times_file) or die "$times_file: $!\n";
    return;
}

# ---- running ----

sub note_skip ($name, $reason) {
    return if grep { $reason =~ $_ } @expected_skips;
    push(@unexpected, "$name: $reason");
}

sub watch_skips ($parser, $job) {
    my $name = $job->[0];
    my $pattern = qr/# skip (.*)/i;
    my $look = sub ($line) { note_skip($name, $1) if $line->as_string =~ $pattern };
    $parser->callback(ALL => $look);
}

# Tests wait more than they compute: for a guest to boot, or for a time limit.
sub default_parallel () {
    my $processors = () = content('/proc/cpuinfo') =~ m/^processor\b/mg;
    return 3 * ($processors || 1);
}

# What failed tests have printed, once more, because it is far above.
sub show_errors ($errors) {
    for my $name (sort keys $errors->%*) {
        next if !-s $errors->{$name};
        my @lines = split(/^/, content($errors->{$name}));
        splice(@lines, 0, -100) if @lines > 100;
        print "\n==== $name ====\n", @lines;
    }
    return;
}

sub run_all (@jobs) {
    my %job = map { $_->{name} => $_ } @jobs;
    my $dir = File::Temp->newdir('pba-errors-XXXXXXXX', TMPDIR => 1);
    my %errors = map { $jobs[$_]{name} => "$dir/$_" } 0 .. $#jobs;
    my $times = known_times();
    my $command = sub ($harness, $name) {
        my $environment = $job{$name}{environment};
        my @set = map { "$_=$environment->{$_}" } sort keys $environment->%*;
        return [
            'env', "PBA_ERRORS=$errors{$name}", @set,
            $^X, 't/one.pl', split(' ', $job{$name}{file})
        ];
    };
    my $harness = TAP::Harness->new(
        {
            exec => $command,
            jobs => $ENV{PBA_JOBS} // default_parallel(),
            timer => 1,
            merge => 0,
        }
    );
    my $elapsed = sub ($parser, $name) {
        $times->{$name} = sprintf('%.1f', $parser->end_time - $parser->start_time);
    };
    $harness->callback(made_parser => \&watch_skips);
    $harness->callback(after_test => sub ($name, $parser) { $elapsed->($parser, $name->[0]) });
    my $result = $harness->runtests(map { $_->{name} } by_time($times, @jobs));
    remember_times($times);
    show_errors(\%errors);
    return $result->all_passed;
}

say "# a part of the second runs, PBA_SEED=$seed" if !$ENV{PBA_FULL} && !@ARGV;
my @all = (-e '.git' ? (@programs, share(1 / 3, @valgrind)) : (), sort(glob('t/*.t')));
my $passed = run_all(jobs_for(@ARGV ? @ARGV : @all)->@*);
if (@unexpected) {
    say "unexpected skip: $_" for @unexpected;
    $passed = 0;
}
exit($passed ? 0 : 1);
