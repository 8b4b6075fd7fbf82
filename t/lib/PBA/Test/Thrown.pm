package PBA::Test::Thrown;

# Exceptions of code refs, callbacks and providers: thrown by a signal handler or by the code itself, as a text
# or as an object, which may evaluate to false.

use v5.36;

use Exporter qw(import);
use Scalar::Util qw(refaddr);

our @EXPORT_OK = qw(is_same strike thrown_by what_arrives);

my $text = "interrupted by signal\n";
my $object = { my => 'exception' };
my $false = bless({}, 'PBA::Test::Thrown::False');

{

    package PBA::Test::Thrown::False;    ## no critic (MultiplePackages) it has nothing but this
    use overload bool => sub { 0 }, '""' => sub { '' }, fallback => 1;
}

my sub send_signal ($signal) { kill($signal => $$) }

# Throws the exception with other words, as mon_cmd does when it catches an exception and dies again.
my sub reworded ($signal) {
    eval { send_signal($signal); 1 } or die "VM 100 qmp command failed - $@";
}

# A time limit in the code ref itself, as in PVE::Tools::run_with_timeout.
my sub time_out () {
    local $SIG{ALRM} = sub { die "got timeout\n" };
    send_signal('ALRM');
}

# name => [the action, what it throws]
my %kinds = (
    'TERM, a text' => [
        sub {
            local $SIG{ALRM} = sub { };
            send_signal('TERM');
        },
        $text
    ],
    'INT, an object' => [sub { send_signal('INT') }, $object],
    'ALRM, in other words' => [sub { reworded('ALRM') }, "alarm\n"],
    'HUP, an object in other words' => [sub { reworded('HUP') }, $object],
    'a false object' => [sub { die $false }, $false],
    'an object' => [sub { die $object }, $object],
    'a text' => [sub { die "no time\n" }, "no time\n"],
    'a time-out' => [\&time_out, "got timeout\n"],
    'an error' => [sub { die "VM 100 qmp command 'x' failed - no\n" }, undef],
);

# Executes the action.
sub strike ($kind) { return $kinds{$kind}[0]->() }

sub thrown_by ($kind) { return $kinds{$kind}[1] }

sub is_same ($got, $expected) {
    return ref($expected)
        ? ref($got) && refaddr($got) == refaddr($expected)
        : defined($got) && !ref($got) && $got eq $expected;
}

sub term_handler { die $text }

# Runs the code with handlers for the signals above. Returns what the code returned, the exception that arrived,
# and whether it arrived later: after a committed backup, it is thrown when the call, and an eval around it,
# have ended.
sub what_arrives ($code) {
    local $SIG{TERM} = \&term_handler;
    local $SIG{INT} = sub { die $object };
    local $SIG{ALRM} = sub { die "alarm\n" };
    local $SIG{HUP} = sub { die $object };
    local $@ = undef;
    my ($done, $value, $error);
    my $late = !eval {
        $done = eval { $value = $code->(); 1 };
        $error = $@;
        my @looks = map { $_ } 1 .. 3;    # points at which Perl runs signal handlers
        $_++ for @looks;
        1;
    };
    return { done => $done, value => $value, late => $late, error => $late ? $@ : $error };
}

1;
