package PVE::BackupAccess::Provider::RBD::Lock;

# Which processes, on any host, may use a guest's archives at the same time. Ceph's own locks remain when their owner is
# killed, but a watch of an object ends with its client. So a lock is a program that watches an object. Each process first
# watches and then looks for other watchers: if two start at once, each sees the other, and at worst both try again.

use v5.36;

use IO::Handle ();
use IO::Select ();

use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Program qw(kill_child new_pipe start_program);
use PVE::BackupAccess::Wait qw(child_ends keep_trying read_some slice);

my $Error = 'PVE::BackupAccess::Error';
our $longest_end = 10;    # seconds, to end a watch

# others: the lock that no other process may hold at the same time; since: what may have happened since the lock was lost.
my %locks = (
    change => {
        others => 'change',
        busy => 'is in use by another backup or prune',
        since => 'another backup or prune may have begun',
    },
    read => {
        others => 'removal',
        busy => 'is in use: another process is removing an archive',
        since => 'another process may have removed the archive',
    },
    removal => {
        others => 'read',
        busy => 'is in use by a verify, restore, serve or mount',
        since => 'another process may be reading the archives',
    },
);

sub kinds ($class) { return sort keys %locks }

my sub fail ($message) { $Error->throw('SystemError', $message) }

# What the program says until it watches the object, or ends. To watch is a write: in a full pool, it waits.
my sub until_it_watches ($out, $tell) {
    my ($said, $got) = ('', 1);
    my $select = IO::Select->new($out);
    while ($got && $said !~ m/press enter/) {
        $tell->();
        $got = read_some($out, \$said, 4096) if $select->can_read(slice(1));
    }
    return $said;
}

# Only its parent can wait for the program, but all processes that have the lock see the end of what it says.
my sub until_it_ends ($out) {
    my ($until, $select, $got, $said) = (now() + $longest_end, IO::Select->new($out), 1, '');
    while ($got && now() < $until) {
        $got = read_some($out, \$said, 4096) if $select->can_read(slice($until - now()));
    }
    return;
}

# Starts to watch the object, and returns when the watch is established. The program ends, and tells the cluster so, when all
# processes have closed the other end of its standard input. If a signal killed it, the cluster would keep the watch for half
# a minute.
my sub watch ($class, $ceph, $object) {
    my ($child_in, $in) = new_pipe();
    my ($out, $child_out) = new_pipe();
    my $self = bless({ owner => $$, in => $in, out => $out }, $class);
    my %how = (in => $child_in, out => $child_out, err => $child_out, signal => 0);
    start_program(\$self->{pid}, \%how, $ceph->command('rados', 'watch', $object));
    close($_) for $child_in, $child_out;
    my $said = $self->{said} = until_it_watches($out, $ceph->teller('rados watch'));
    return $self if $said =~ m/press enter/;
    $self->drop;
    $said =~ s/\s+\z//;
    fail(     "cannot watch the object $object in rbd:"
            . $ceph->place . ' - '
            . ($said eq '' ? 'rados has ended' : $said));
}

# Returns undef if another process has a lock that excludes this one. The objects are $object.change and so on.
sub try ($class, $ceph, $object, $kind) {
    my $others = $locks{$kind}{others};
    my $self = watch($class, $ceph, "$object.$kind");
    my $most = $others eq $kind ? 1 : 0;
    $self->@{qw(ceph object kind)} = ($ceph, "$object.$kind", $kind);
    my @watchers = $ceph->watchers("$object.$others");
    fail("the cluster does not list the watch of the object $object.$kind in rbd:" . $ceph->place)
        if $most && !@watchers;
    $self->{watcher} = $watchers[0] if $most;
    return $self if @watchers <= $most;
    $self->drop;
    return undef;
}

my sub fail_as_lost ($self) {
    $Error->throw('StateError',
              "the lock $self->{object} in rbd:"
            . $self->{ceph}->place
            . ' was lost, because the cluster has not heard of this host for half a minute, and '
            . "$locks{$self->{kind}}{since} - try again");
}

# Dies if the program has ended, or has reported that the cluster does not know the watch any more: this process, its host
# or the network did not respond for half a minute. Asks nothing of the cluster.
sub check_report ($self) {
    my $out = $self->{out};
    my $got = 1;
    $got = read_some($out, \$self->{said}, 4096) while $got && IO::Select->new($out)->can_read(0);
    fail_as_lost($self) if !$got || $self->{said} =~ m/^ERROR/m;
    return;
}

# The same, but also asks the cluster. For locks that exclude their own kind.
sub check ($self) {
    $self->check_report;
    return if grep { $_ eq $self->{watcher} } $self->{ceph}->watchers($self->{object});
    fail_as_lost($self);
}

# The same, but waits up to $seconds, and then dies.
sub take ($class, $ceph, $object, $kind, $seconds) {
    my $lock = keep_trying($seconds, sub () { $class->try($ceph, $object, $kind) });
    return $lock if $lock;
    $Error->throw('StateError',
              "$object in rbd:"
            . $ceph->place
            . " $locks{$kind}{busy} - try again when that has ended, or wait for it (--wait)");
}

# A forked process may still have the other end of the pipe: the newline tells the program to end now. To end a watch is a
# write: in a full pool, or without an OSD, it waits.
sub drop ($self) {
    my $pid = $self->{pid} // return;
    local ($!, $?);
    if (my $in = delete($self->{in})) {
        local $SIG{PIPE} = 'IGNORE';    # it may have ended
        syswrite($in, "\n");
        close($in);
    }
    until_it_ends($self->{out});
    kill_child($pid) if !child_ends($pid, 1);
    delete($self->{pid});
    return;
}

# Leaves the lock to a forked process, which drops it. After that, drop only waits for the program.
sub leave ($self) {
    close(delete($self->{in}));
    return;
}

sub CLONE_SKIP { return 1 }

sub DESTROY ($self) {
    $self->drop if $self->{owner} == $$;
    return;
}

1;
