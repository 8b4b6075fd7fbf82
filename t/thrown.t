# What signal handlers and code refs die with, in the middle of a call: it arrives as it was thrown,
# the same reference or the same text; what was begun is undone; an error of QEMU's stays one.
#
# The guest does not matter here, so there is none: a point takes a tenth of a second. PBA_FULL=1 takes
# each kind of exception at each of them.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Scalar::Util qw(refaddr);
use Test::More;

use PBA::Test::Backend;
use PBA::Test::QMP;
use PBA::Test::Watchdog;

my $object = { my => 'exception' };
my $false = bless({}, 'False');
my $text = "interrupted by signal\n";

{

    package False;
    use overload bool => sub { 0 }, '""' => sub { '' }, fallback => 1;
}

my sub send_signal ($signal) { kill($signal => $$) }

# In other words, as mon_cmd does where it catches and dies again.
my sub reworded ($signal) {
    eval { send_signal($signal); 1 } or die "VM 100 qmp command failed - $@";
}

# A time limit of the code ref's own, as PVE::Tools::run_with_timeout has it.
my sub time_out () {
    local $SIG{ALRM} = sub { die "got timeout\n" };
    send_signal('ALRM');
}

# name => [what happens in the code ref, what arrives; undef: an error of the command's]
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
    'a time-out' => [\&time_out, undef],
    'an error' => [sub { die "VM 100 qmp command 'x' failed - no\n" }, undef],
);

sub term_handler { die $text }

my sub with_handlers ($code) {
    local $SIG{TERM} = 'term_handler';
    local $SIG{INT} = sub { die $object };
    local $SIG{ALRM} = sub { die "alarm\n" };
    local $SIG{HUP} = sub { die $object };
    local $@ = undef;
    my ($done, $error);

    # After a backup that was committed it comes when the call, and an eval around it, is over.
    my $late = !eval {
        $done = eval { $code->(); 1 };
        $error = $@;
        1;
    };
    return ($done, $late ? $@ : $error);
}

my sub is_same ($got, $expected) {
    return ref($expected)
        ? ref($got) && refaddr($got) == refaddr($expected)
        : !ref($got) && $got eq $expected;
}

my sub is_own ($error) { return ref($error) eq 'PVE::BackupAccess::Error' }

# What is done with a code ref, and whether it may come to a good end in spite of an exception.
my %uses = (
    'an access' => sub ($context) {
        my $access = $context->{access} = $context->{new}->();
        $access->setup($context->{devices});
        $context->{was_up} = 1;
        $access->volumes('nbd');
        $access->teardown(1);
    },
    'a failed backup' => sub ($context) {
        my $access = $context->{access} = $context->{new}->();
        $access->setup($context->{devices});
        $context->{was_up} = 1;
        $access->teardown(0);
    },
    'sizes' => sub ($context) { $context->{new}->()->sizes($context->{devices}[0]{device}) },
    'capabilities' => sub ($context) {
        PVE::BackupAccess->capabilities(qmp => $context->{options}{qmp});
    },
    'status' => sub ($context) {
        my %options = $context->{options}->%*;
        delete($options{'target-id'});
        PVE::BackupAccess->status(%options);
    },
    'recover' => sub ($context) {
        my %options = $context->{options}->%*;
        PVE::BackupAccess->recover(%options, log => sub { });
    },
);

# One use in which something happens at a command. Returns whether there was such a command.
sub check_point ($backend, $monitor, $outside, %point) {
    my ($strike, $expected) = $kinds{ $point{kind} }->@*;
    my $name = "$point{use}, command $point{at}, $point{when}: $point{kind}";
    my ($count, $struck, @after, @log) = (0);
    my $qmp = sub ($command, $arguments) {
        push(@after, $command) if $count >= $point{at};
        my $hit = ++$count == $point{at};
        $struck = $command if $hit;
        $strike->() if $hit && $point{when} eq 'before';
        my $value = $monitor->execute($command, $arguments->%*);
        $strike->() if $hit && $point{when} eq 'after';
        return $value;
    };
    my %options = $backend->options(qmp => $qmp);
    delete($options{timeout});
    my $context = {
        devices => $backend->devices('use'),
        options => \%options,
        new => sub {
            PVE::BackupAccess->new(%options, log => sub ($level, $line) { push(@log, $line) });
        },
    };
    my ($done, $error) = with_handlers(sub { $uses{ $point{use} }->($context) });
    return 0 if $count < $point{at};
    my $access = $context->{access};
    if ($done) {

        # A backup that was committed; or a command that may fail.
        ok(!defined($expected) || is_same($error, $expected), "$name: arrives after that")
            or diag($error, @log, "after it: @after");
        ok(!$access || !$access->_is_up, "$name: and all is over");
    }
    else {
        ok(defined($expected) ? is_same($error, $expected) : is_own($error), "$name: arrives")
            or diag(ref($error) || $error);
        ok(!$access || $context->{was_up} || !$access->_is_up, "$name: a setup is undone");
        ok(!(grep { $_ eq 'block-export-add' } @after), "$name: the work ends");
    }
    $access->teardown(0) if $access && $access->_is_up;
    undef $access;
    undef $context->{access};
    is_deeply([$backend->problems($outside)], [], "$name: nothing is left")
        or diag(
        explain($struck, \@after, \@log, [$backend->problems($outside)], $backend->other_bitmaps)),
        BAIL_OUT('what is left would be found after each');
    return 1;
}

sub check_backend ($name) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        guest => 0,
        disks => [{ id => 'disk0', size => 16 << 20, bus => 'scsi', shape => 'drive' }],
    );
    my $outside = $backend->outside;
    my $monitor = PBA::Test::QMP->new(path => $backend->qmp_path);
    my @kinds = sort keys %kinds;
    for my $use (sort keys %uses) {
        my $at = 0;
        my $more = 1;
        while ($more) {
            $at++;
            for my $when (qw(before after)) {
                push(@kinds, shift(@kinds));
                for my $kind ($ENV{PBA_FULL} ? @kinds : $kinds[0]) {
                    $more &&= check_point(
                        $backend, $monitor, $outside,
                        use => $use,
                        at => $at,
                        when => $when,
                        kind => $kind
                    );
                }
            }
        }
        cmp_ok($at, '>', 1, "$use: commands were sent");
    }
}

subtest "backend $_" => sub { check_backend($_) }
    for PBA::Test::Backend->names;

done_testing;
