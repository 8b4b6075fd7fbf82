# Exceptions of signal handlers and code refs during a call: they arrive unchanged, as the same reference or the
# same text; what was begun is undone; and an error of QEMU stays an error.
#
# The guest does not matter, so there is none: a point takes a tenth of a second. A plain run tests every second
# command; PBA_FULL=1 tests each kind of exception at all commands, before and after.
#
# One QEMU is enough: exceptions belong to the caller; PBA_FULL=1 runs on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Test::More;

use PBA::Test::Backend;
use PBA::Test::QMP;
use PBA::Test::Thrown qw(is_same strike thrown_by what_arrives);
use PBA::Test::Watchdog;

# What arrives for each kind; undef: an error of the command.
my %kinds = map { $_ => thrown_by($_) } (
    'TERM, a text',
    'INT, an object',
    'ALRM, in other words',
    'HUP, an object in other words',
    'a false object',
    'an error',
);
$kinds{'a time-out'} = undef;

my sub is_own ($error) { return ref($error) eq 'PVE::BackupAccess::Error' }

# The uses of a code ref, and whether each can succeed in spite of an exception.
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

# A code ref in which something happens at a command. Counts the commands, and records those that are sent
# afterwards.
sub code_ref ($monitor, $point) {
    return sub ($command, $arguments) {
        push($point->{after}->@*, $command) if $point->{count} >= $point->{at};
        my $hit = ++$point->{count} == $point->{at};
        strike($point->{kind}) if $hit && $point->{when} eq 'before';
        my $value = $monitor->execute($command, $arguments->%*);
        strike($point->{kind}) if $hit && $point->{when} eq 'after';
        return $value;
    };
}

sub check_error ($name, $point, $context, $got) {
    my ($access, $expected) = ($context->{access}, $kinds{ $point->{kind} });
    if ($got->{done}) {

        # The backup was committed, or the command may fail.
        ok(!defined($expected) || is_same($got->{error}, $expected), "$name: arrives after that")
            or diag($got->{error}, $context->{log}->@*, "after it: $point->{after}->@*");
        ok(!$access || !$access->_is_up, "$name: the access has ended");
        return;
    }
    my $right = defined($expected) ? is_same($got->{error}, $expected) : is_own($got->{error});
    ok($right, "$name: arrives") or diag(ref($got->{error}) || $got->{error});
    ok(!$access || $context->{was_up} || !$access->_is_up, "$name: a setup is undone");
    ok(!(grep { $_ eq 'block-export-add' } $point->{after}->@*), "$name: the work ends");
}

# One use with an event at a command. Returns whether there was such a command.
sub check_point ($backend, $monitor, $outside, %at) {
    my $point = { %at, count => 0, after => [] };
    my $name = "$at{use}, command $at{at}, $at{when}: $at{kind}";
    my %options = $backend->options(qmp => code_ref($monitor, $point));
    delete($options{timeout});
    my $log = [];
    my $context = {
        devices => $backend->devices('use'),
        options => \%options,
        log => $log,
        new => sub {
            PVE::BackupAccess->new(%options, log => sub ($level, $line) { push($log->@*, $line) });
        },
    };
    my $got = what_arrives(sub { $uses{ $at{use} }->($context) });
    return 0 if $point->{count} < $at{at};
    check_error($name, $point, $context, $got);
    my $access = delete($context->{access});
    $access->teardown(0) if $access && $access->_is_up;
    undef $access;
    is_deeply([$backend->problems($outside)], [], "$name: nothing is left")
        or diag(explain($point, $log, $backend->other_bitmaps)),
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
    my @whens = qw(before after);
    my $step = $ENV{PBA_FULL} ? 1 : 2;
    for my $use (sort keys %uses) {
        my $at = 1 - $step;
        my $more = 1;
        while ($more) {
            $at += $step;
            for my $when ($ENV{PBA_FULL} ? @whens : $whens[(($at + 1) / 2 + ($name eq 'pve')) % 2])
            {
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
