# A child that hangs in a call does not end when it is killed. Whoever started it goes on after a while and says why,
# instead of waiting until that call returns.
#
# One QEMU is enough: none is started.

use v5.36;

use Test::More;

# Children that were killed. Each lives on until the end of its test, as if it hung.
my @hung;

BEGIN {
    *CORE::GLOBAL::kill = sub ($signal, @pids) {
        push(@hung, @pids);
        return scalar(@pids);
    };
}

use PVE::BackupAccess::CLI::TryProvider::Machine;
use PVE::BackupAccess::Libvirt::Shell;
use PVE::BackupAccess::Program qw(new_pipe start_program);
use PVE::BackupAccess::Provider::Store::Container;
use PVE::BackupAccess::Provider::RBD::Lock;
use PVE::BackupAccess::Provider::Store::RawFile;

my @sleeper = (sleep => 1000);

sub shell (@command) {
    my $shell = PVE::BackupAccess::Libvirt::Shell->new(undef, 1);
    $shell->{command} = \@command;
    return $shell;
}

# An object whose child does not end.
sub object ($class, %fields) {
    my $self = bless({ owner => $$, %fields }, "PVE::BackupAccess::$class");
    start_program(\$self->{pid}, {}, @sleeper);
    return $self;
}

# Each returns a text.
my %cases = (
    'a virsh of its own' => sub () {
        eval { shell('sleep')->run('1000') };
        return $@;
    },
    'a virsh of its own, which has closed its output' => sub () {
        eval { shell(qw(sh -c))->run('exec >&- 2>&-; exec sleep 1000') };
        return $@;
    },
    'a virsh for many commands' => sub () {
        eval { shell(@sleeper)->ask('list') };
        return $@;
    },
    'a virsh that is not needed any more' => sub () {
        my $shell = shell('sh', '-c', 'sh; exec sleep 1000');
        return $shell->ask('echo list');
    },
    'a watch of the cluster' => sub () {
        local $PVE::BackupAccess::Provider::RBD::Lock::longest_end = 1;
        my (undef, $in) = new_pipe();
        object('Provider::RBD::Lock', in => $in)->drop;
        return 'dropped';
    },
    'a process that stores a container' => sub () {
        local $PVE::BackupAccess::Provider::Store::Container::longest_end = 1;
        my (undef, $control) = new_pipe();
        object('Provider::Store::Container', control => $control)->end(1);
        return 'ended';
    },
    'a process that serves a raw file' => sub () {
        local $PVE::BackupAccess::Provider::Store::RawFile::longest_end = 1;
        my (undef, $socket) = new_pipe();
        object('Provider::Store::RawFile', socket => $socket, path => '/none')->stop;
        return 'ended';
    },
    'a QEMU of try-provider' => sub () {
        object('CLI::TryProvider::Machine')->end;
        return 'ended';
    },
);
my $late = qr/did not answer within 1 seconds$/;
my %said = (
    'a virsh of its own' => qr/\Avirsh 1000 failed - virsh $late/,
    'a virsh of its own, which has closed its output' => $late,
    'a virsh for many commands' => $late,
    'a virsh that is not needed any more' => qr/\Alist$/,
    'a watch of the cluster' => qr/\Adropped\z/,
    'a process that stores a container' => qr/\Aended\z/,
    'a process that serves a raw file' => qr/\Aended\z/,
    'a QEMU of try-provider' => qr/\Aended\z/,
);

for my $name (sort keys %cases) {
    @hung = ();
    local $SIG{ALRM} = sub { CORE::kill(KILL => @hung); die "it does not end\n" };
    alarm(20);
    my $said = eval { $cases{$name}->() } // $@;
    alarm(0);
    like($said, $said{$name}, $name);
    is(scalar(@hung), 1, "$name: one child was killed");
    CORE::kill(KILL => @hung);
    waitpid($_, 0) for @hung;
}

done_testing;
