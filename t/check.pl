# The gates that do not run the program: ./run check [GATE...]. With --quick, as in ./run test, those that take
# minutes are omitted, and costly ones only check the files that recent commits have changed.
#
# Each gate checks some files. Good results are stored (in the tests' cache, by the content of everything on
# which the result depends), so that the next run only checks what has changed.

use v5.36;

use Digest::SHA ();
use FindBin;
use lib "$FindBin::Bin/lib";
use File::Temp ();
use POSIX ();

use PBA::Test::Cache;
use PBA::Test::Gates;
use PBA::Test::Sources qw(lines_of);

my $processes = 2;

sub content ($file) {
    open(my $fh, '<:raw', $file) or die "cannot read $file: $!\n";
    local $/;
    return scalar(<$fh>);
}

my $good_dir = PBA::Test::Cache->directory . '/checked';

sub stamp ($gate, $file) {
    my $digest = Digest::SHA->new(256);
    $digest->add($gate->{name}, "\0", $gate->{version}->(), "\0", $file, "\0");
    $digest->add(content($_), "\0") for $file, $gate->{depends_on}->($file), $gate->{code}->@*;
    return "$good_dir/" . $digest->hexdigest;
}

my %is_recent;    # with --quick

sub is_recent ($gate, $file) {
    return !%is_recent || !$gate->{is_costly} || $is_recent{$file};
}

# Splits a gate's files into parts, one for each process.
sub parts ($gate) {
    my @files = grep { !-e $_->{stamp} }
        map { { name => $_, stamp => stamp($gate, $_) } }
        grep { is_recent($gate, $_) } $gate->{files}->();
    my @parts;
    push(@parts, [splice(@files, 0, $gate->{at_once})]) while @files;
    return map { { gate => $gate, files => $_ } } @parts;
}

# In a child process: writes the problems to a file.
sub start ($part) {
    $part->{output} = File::Temp->new;
    my $pid = fork() // die "cannot fork: $!\n";
    return $pid if $pid;
    open(STDOUT, '>&', $part->{output}) or POSIX::_exit(3);
    open(STDERR, '>&', $part->{output}) or POSIX::_exit(3);
    my $good = eval {
        $part->{gate}{check}->(map { $_->{name} } $part->{files}->@*);
    };
    print STDERR $@ if $@;
    STDOUT->flush;
    POSIX::_exit($good ? 0 : 1);
}

sub finish ($part, $status) {
    if ($status == 0) {
        for my $file ($part->{files}->@*) {
            open(my $fh, '>', $file->{stamp}) or die "$file->{stamp}: $!\n";
        }
        return;
    }
    $part->{gate}{wrong} .= content("$part->{output}") || "failed with status $status\n";
    return;
}

sub run_all (@parts) {
    my %running;
    while (@parts || %running) {
        while (@parts && keys(%running) < $processes) {
            my $part = shift(@parts);
            $running{ start($part) } = $part;
        }
        my $pid = waitpid(-1, 0);
        my $part = delete($running{$pid}) // next;
        finish($part, $?);
    }
    return;
}

mkdir($good_dir);
unlink(grep { -M $_ > 14 } glob("$good_dir/*"));
my %wanted = map { $_ => 1 } @ARGV;
my $is_quick = delete($wanted{'--quick'}) && !$ENV{PBA_FULL};
my @gates = grep { !%wanted || $wanted{ $_->{name} } } PBA::Test::Gates::all();
if ($is_quick) {
    @gates = grep { !$_->{is_slow} } @gates;
    %is_recent = map { $_ => 1 } lines_of(qw(git log -60 --name-only --format= HEAD));
    $is_recent{$_} = 1 for lines_of(qw(git diff --name-only HEAD));
}

# The results of formatters and checkers depend on their version.
my $is_elsewhere = $is_quick && PBA::Test::Cache->codename ne 'bookworm';
my sub is_left_out ($gate) { return $is_elsewhere && !$gate->{is_own} }
run_all(map { parts($_) } grep { !is_left_out($_) } @gates);

# TAP, so that this can be one of the tests.
say '1..' . @gates;
my ($number, $failed) = (0, 0);
for my $gate (@gates) {
    $number++;
    if (is_left_out($gate)) {
        say "ok $number # skip needs the tools of Debian 12: $gate->{name}";
        next;
    }
    my $count = () = $gate->{files}->();
    say $gate->{wrong} ? 'not ok' : 'ok', " $number - $gate->{name}, $count files";
    next if !$gate->{wrong};
    $failed++;
    print STDERR "\n$gate->{wrong}\n$gate->{name}: $gate->{hint}\n";
}
exit($failed ? 1 : 0);
