package PVE::BackupAccess::CLI::TryProvider::Process;

# What a provider must leave in this process as it was: VZDump backs up other guests in the same process, and a
# signal must end it.

use v5.36;

use Cwd qw(getcwd);
use Time::HiRes qw(sleep);

use PVE::BackupAccess::Clock qw(now);

my @signals = qw(ALRM CHLD HUP INT PIPE QUIT TERM);
my $end_limit = 2;    # seconds for the end of child processes that were told to end

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
        map { ("the handler of SIG$_" => '' . handler_of($_)) } @signals,
    };
}

sub new ($class) {
    my %handlers = map { $_ => handler_of($_) } @signals;
    return bless({ look => look(), handlers => \%handlers, children => children() }, $class);
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

# Says what has changed; undef if nothing has. Restores what the rest of the test needs.
sub problem ($self) {
    my $now = look();
    my @problems = map { "$_ was changed" }
        grep { $now->{$_} ne $self->{look}{$_} } sort keys $now->%*;
    $SIG{$_} = $self->{handlers}{$_} for @signals;
    my ($dir) = $self->{look}{'the working directory'} =~ m/\A(.*)\z/s;
    chdir($dir) or push(@problems, "$dir cannot be entered any more: $!");
    umask($self->{look}{'the file mode creation mask'});
    push(@problems, new_children($self));
    return @problems ? join(', ', @problems) : undef;
}

1;
