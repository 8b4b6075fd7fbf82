package PVE::BackupAccess::Provider::RBD::Lock;

# Who works on a guest's archives at once, on whichever host. Ceph's own locks stay when their owner is killed; what
# goes with a client is that it watches an object. So a lock is a program that watches one. Each first watches and
# then looks who else does: of two that begin at once none can miss the other one, and at worst both begin again.

use v5.36;

use IO::Handle ();
use Time::HiRes ();

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Program qw(new_pipe start_program);
use PVE::BackupAccess::Wait qw(pause read_some wait_for_child);

my $Error = 'PVE::BackupAccess::Error';
my $look_every
    = 0.2;    # seconds, or half of it more: two that try at once are to be apart the next time

# What is watched, and of what others may not watch.
my %locks = (
    change => {
        others => 'change',
        busy => 'is in use by another backup or prune',
    },
    read => {
        others => 'removal',
        busy => 'is having an archive removed by another process',
    },
    removal => {
        others => 'read',
        busy => 'is read by a verify, restore, serve or mount',
    },
);

sub kinds ($class) { return sort keys %locks }

my sub fail ($message) { $Error->throw('SystemError', $message) }

# Returns when the object is watched. The program ends, and tells the cluster so, when all processes have closed the other
# end of its standard input. If a signal ended it, the cluster would keep the watch for half a minute.
my sub watch ($class, $ceph, $object) {
    my ($child_in, $in) = new_pipe();
    my ($out, $child_out) = new_pipe();
    my $self = bless({ owner => $$, in => $in, out => $out }, $class);
    my %how = (in => $child_in, out => $child_out, err => $child_out, signal => 0);
    start_program(\$self->{pid}, \%how, $ceph->command('rados', 'watch', $object));
    close($_) for $child_in, $child_out;
    my $said = '';
    1 while $said !~ m/press enter/ && read_some($out, \$said, 4096);
    return $self if $said =~ m/press enter/;
    $self->drop;
    fail("cannot watch $object - " . $said =~ s/\s+\z//r);
}

# Undef if another process has what excludes it. The objects are $object.change and so on.
sub try ($class, $ceph, $object, $kind) {
    my $others = $locks{$kind}{others};
    my $self = watch($class, $ceph, "$object.$kind");
    my $most = $others eq $kind ? 1 : 0;
    return $self if $ceph->watchers("$object.$others") <= $most;
    $self->drop;
    return undef;
}

# The same, or it dies after so many seconds.
sub take ($class, $ceph, $object, $kind, $seconds) {
    my $deadline = Time::HiRes::time() + $seconds;
    while (1) {
        my $lock = $class->try($ceph, $object, $kind);
        return $lock if $lock;
        last if Time::HiRes::time() >= $deadline;
        pause($look_every * (1 + rand(0.5)));
    }
    $Error->throw('StateError',
              "$object in "
            . $ceph->place
            . " $locks{$kind}{busy} - try again when it has ended, or wait for it");
}

# A forked process may still have the other end of the pipe: the newline tells the program to end now.
sub drop ($self) {
    my $pid = delete($self->{pid}) // return;
    local ($!, $?);
    syswrite($self->{in}, "\n");
    close($self->{in});
    wait_for_child($pid);
    return;
}

sub CLONE_SKIP { return 1 }

sub DESTROY ($self) {
    return if $self->{owner} != $$;
    local $SIG{PIPE} = 'IGNORE';
    $self->drop;
    return;
}

1;
