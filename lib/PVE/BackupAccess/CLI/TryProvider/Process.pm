package PVE::BackupAccess::CLI::TryProvider::Process;

# What a provider must leave in this process as it was: VZDump backs up other guests in the same process, and a
# signal must end it.

use v5.36;

use Cwd qw(getcwd);
use POSIX ();
use Time::HiRes qw(sleep);

use PVE::BackupAccess::Clock qw(now);

my @signals = qw(ALRM CHLD HUP INT PIPE QUIT TERM);
my $end_limit = 2;    # seconds for the end of child processes that were told to end

# As file descriptors 0 to 2.
my @streams = (\*STDIN, \*STDOUT, \*STDERR);
my @modes = ('<', '>', '>');
my @stream_names = ('standard input', 'standard output', 'standard error');

my sub handler_of ($signal) { return $SIG{$signal} || 'DEFAULT' }

# { PID => name } of the child processes that run.
my sub children () {
    my %children;
    for my $file (glob('/proc/[0-9]*/stat')) {
        open(my $fh, '<', $file) or next;    # it has ended
        my ($pid, $name, $state, $parent) = (<$fh> // '') =~ m/\A([0-9]+) \((.*)\) (\S) ([0-9]+) /;
        $children{$pid} = $name if defined($parent) && $parent == $$ && $state ne 'Z';
    }
    return \%children;
}

my sub look () {
    my $mask = umask();           # by itself: the directory is tainted
    my $dir = getcwd() // '/';    # it was removed
    return {
        'the working directory' => $dir,
        'the file mode creation mask' => $mask,
        'the input record separator $/' => $/ // 'undef',
        (map { ("the handler of SIG$_" => '' . handler_of($_)) } @signals),
        map {
            ($stream_names[$_] => defined(fileno($streams[$_])) && readlink("/proc/self/fd/$_")
                    || 'closed')
        } 0 .. 2,
    };
}

# undef if it is not open.
my sub copy_of ($fd) {
    open(my $copy, "$modes[$fd]&", $streams[$fd]) or return undef;
    return $copy;
}

sub new ($class) {
    my %handlers = map { $_ => handler_of($_) } @signals;
    my %self = (
        look => look(),
        handlers => \%handlers,
        children => children(),
        separator => $/,
        copies => [map { copy_of($_) } 0 .. 2],
    );
    return bless(\%self, $class);
}

my sub new_children ($self) {
    my $deadline = now() + $end_limit;
    while (1) {
        my $now = children();
        my @new = grep { !exists($self->{children}{$_}) } sort { $a <=> $b } keys $now->%*;
        return map { "child process $_ ($now->{$_}) still runs" } @new
            if !@new || now() > $deadline;
        sleep(0.05);
    }
}

my sub restore_stream ($self, $fd) {
    my $copy = $self->{copies}[$fd] // return;
    close($streams[$fd]);
    POSIX::dup2(fileno($copy), $fd) // die "dup2: $!\n";
    open($streams[$fd], "$modes[$fd]&=", $fd) or die "$stream_names[$fd]: $!\n";
}

# Says what has changed; undef if nothing has. Restores what the rest of the test needs.
sub problem ($self) {
    my $now = look();
    my @problems = map { "$_ was changed" }
        grep { $now->{$_} ne $self->{look}{$_} } sort keys $now->%*;
    push(@problems, 'an alarm is set') if alarm(0);
    $SIG{$_} = $self->{handlers}{$_} for @signals;
    $/ = $self->{separator};
    restore_stream($self, $_)
        for grep { $now->{ $stream_names[$_] } ne $self->{look}{ $stream_names[$_] } } 0 .. 2;
    my ($dir) = $self->{look}{'the working directory'} =~ m/\A(.*)\z/s;
    chdir($dir) or push(@problems, "$dir cannot be entered any more: $!");
    umask($self->{look}{'the file mode creation mask'});
    push(@problems, new_children($self));
    return @problems ? join(', ', @problems) : undef;
}

1;
