package PVE::BackupAccess::Provider::Store::Workers;

# Works on several items in parallel, each in a process of its own, because a copy runs its callbacks in the caller's
# thread. Workers report over pipes. The first failure ends all of them, and none remains.

use v5.36;

use IO::Handle ();
use IO::Select ();
use JSON::PP ();
use POSIX qw(SIG_SETMASK);

use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Program qw(end_with fork_child kill_child new_pipe);
use PVE::BackupAccess::Try qw(deaths_of ensure is_own);
use PVE::BackupAccess::Wait qw(child_ends wait_for_child);

use Exporter qw(import);

our @EXPORT_OK = qw(side_by_side);

my $Error = 'PVE::BackupAccess::Error';
my $json = JSON::PP->new->utf8->allow_nonref;

my $seconds_to_end = 10;    # after SIGTERM, and after SIGKILL

my sub send_to ($pipe, $kind, $value) {
    print {$pipe} $json->encode([$kind, $value]), "\n" or die "the parent is gone\n";
    return;
}

# An error as data, and back.
my sub data_of ($error) { return is_own($error) ? { $error->%* } : { text => "$error" } }

my sub throw ($data) {
    die $data->{text} if defined($data->{text});
    chomp(my $message = delete($data->{message}));
    $Error->throw(delete($data->{class}), $message, $data->%*);
}

# A worker ignores a terminal's signals. The parent gets them and ends the workers. mask: the signals that the caller blocks.
my sub run_worker ($pipe, $code, $item, $mask) {
    local @SIG{qw(INT QUIT HUP)} = ('IGNORE') x 3;
    local $SIG{PIPE} = 'IGNORE';
    local $SIG{TERM} = sub { die "told to end\n" };
    my $result;
    my ($death) = deaths_of(
        sub {
            POSIX::sigprocmask(SIG_SETMASK, $mask);
            $result = $code->($item, sub ($value) { send_to($pipe, told => $value) });
        }
    );
    my @outcome = $death ? (error => data_of($death->[0])) : (result => $result);
    return send_to($pipe, @outcome);
}

# Adds a new worker to the others.
my sub start ($workers, $code, $item) {
    my ($read, $write) = new_pipe();
    my $parent = $$;
    my $work = sub ($mask) {
        end_with($parent);
        $write->autoflush;
        srand();    # else all workers choose the same random names for their private files

        # A worker must not run the parent's cleanup, so no exception leaves this function.
        deaths_of(sub { run_worker($write, $code, $item, $mask) });
        POSIX::_exit(0);
    };
    my $note = sub ($pid) {
        $workers->{ fileno($read) } = { pid => $pid, read => $read, item => $item, text => '' };
    };
    my $problem = fork_child($note, $work) // return;
    $Error->throw('SystemError', "$item: cannot start a worker process - $problem");
}

# The next messages of a worker, undef at its end.
my sub messages_of ($worker) {
    my $got = sysread($worker->{read}, $worker->{text}, 1 << 16, length($worker->{text}));
    return [] if !defined($got) && $!{EINTR};
    return undef if !$got;
    my @messages;
    push(@messages, $json->decode($1)) while $worker->{text} =~ s/\A([^\n]*)\n//;
    return \@messages;
}

# All workers have ended when this returns, except those that hang: a remaining reader would delay the teardown.
my sub end_all ($workers) {
    my $until = now() + $seconds_to_end;
    kill('TERM', $_->{pid}) for values $workers->%*;
    for my $worker (values $workers->%*) {
        next if child_ends($worker->{pid}, $until - now());
        kill_child($worker->{pid}, $seconds_to_end);
    }
    $workers->%* = ();
    return;
}

# Handles the next messages of a worker. Returns 0 at its end.
my sub hear ($worker, $results, $told) {
    my $messages = messages_of($worker) // return 0;
    for my $message ($messages->@*) {
        my ($kind, $value) = $message->@*;
        throw($value) if $kind eq 'error';
        $told->($worker->{item}, $value) if $kind eq 'told';
        $results->{ $worker->{item} } = $value if $kind eq 'result';
    }
    return 1;
}

my sub finish ($workers, $worker, $results) {
    delete($workers->{ fileno($worker->{read}) });
    wait_for_child($worker->{pid});
    $Error->throw('SystemError', "$worker->{item}: its worker process ended without a result")
        if !exists($results->{ $worker->{item} });
    return;
}

my sub look_after ($workers, $results, $told) {
    for my $pipe (IO::Select->new(map { $_->{read} } values $workers->%*)->can_read(0.2)) {
        my $worker = $workers->{ fileno($pipe) };
        finish($workers, $worker, $results) if !hear($worker, $results, $told);
    }
    return;
}

# Calls $code->($item, $tell) for each item, for up to $jobs items in parallel, and $told->($item, $value) for each value
# that a worker passes to $tell. Returns { item => result }. Values must be expressible in JSON.
sub side_by_side ($jobs, $items, $code, $told) {
    local $SIG{CHLD} = 'DEFAULT';    # the caller's may wait for every child
    my (%workers, %results);
    my @waiting = $items->@*;
    ensure(
        sub {
            while (@waiting || %workers) {
                while (@waiting && keys %workers < $jobs) {
                    start(\%workers, $code, shift(@waiting));
                }
                look_after(\%workers, \%results, $told);
            }
        },
        sub (@) { end_all(\%workers) },
    );
    return \%results;
}

1;
