package PBA::Test::StoreLife::Mishaps;

# The operations in the life of a store, and the mishaps during them.

use v5.36;

use File::Path ();
use JSON::PP ();
use POSIX ();
use Time::HiRes ();

use PBA::Test::Handle ();
use PBA::Test::StoreLife::Kept qw(slurp);
use PBA::Test::Strike qw(strike_at strikes_ended);

my $json = JSON::PP->new->utf8->allow_nonref;

my $seconds_to_end = 60;
my $most_calls = 60;    # roughly the number of calls in a backup of three devices

# Runs the code, which gets a function to report with. Returns { died => its error, or undef; what it reported
# }. A separate process is killed and may leave programs behind, which end with it.
sub _perform ($self, $mishap, $code) {
    $self->{mishap} = $mishap;
    $self->{count}{ $mishap // 'no mishap' }++;
    my $is_apart = ($mishap // '') =~ m/\Akilled/;
    return $self->_perform_apart($mishap, $code) if $is_apart;
    my %result;
    my $report = sub ($key, $value) { $result{$key} = $value };
    my $ballast = ($mishap // '') eq 'full' ? $self->_fill : undef;
    my $failing = sub ($where) { $self->_tell("    fails: $where"); return 1 };
    my $flip = sub ($where) { $self->_tell("    $where"); $self->_flip; return 0 };
    my $strike = { 'a call fails' => $failing, flip => $flip }->{ $mishap // '' };
    strike_at(1 + int(rand($most_calls)), $strike) if $strike;
    my $done = eval { $code->($report); 1 };
    my $error = $done ? undef : $@ || 'it died';
    strikes_ended();
    unlink($ballast) if defined($ballast);
    $self->_tell('    died: ' . $error =~ s/\n.*//sr) if defined($error);
    return { %result, died => $error };
}

sub _perform_apart ($self, $mishap, $code) {
    my $file = "$self->{scratch}/report";
    unlink($file);
    my $call = 1 + int(rand($most_calls));
    my $time = rand(0.4);
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        open(my $out, '>', $file) or POSIX::_exit(1);
        $out->autoflush(1);
        my $report = sub (@pair) { print {$out} $json->encode(\@pair) . "\n" };
        strike_at($call, sub ($where) { $report->(where => $where); kill(KILL => $$) })
            if $mishap eq 'killed';
        my $done = eval { $code->($report); 1 };
        $report->(died => "$@") if !$done;
        POSIX::_exit(0);
    }
    if ($mishap ne 'killed') {
        Time::HiRes::sleep($time);
        kill(KILL => $pid);
    }
    waitpid($pid, 0);
    my $was_killed = $? != 0;
    $self->_wait_for_left;
    open(my $in, '<', $file) or return { died => 'killed at once' };
    my %result = map {
        my $pair = eval { $json->decode($_) };
        $pair ? $pair->@* : ()
    } <$in>;
    $result{died} //= 'killed' if $was_killed;
    $self->_tell("    $mishap: " . ($result{where} // '') . ' ' . ($result{died} // 'not'));
    return \%result;
}

# Programs of a killed process become children of this process, and end by themselves.
sub _wait_for_left ($self) {
    my $deadline = Time::HiRes::time() + $seconds_to_end;
    while ((my $ended = waitpid(-1, POSIX::WNOHANG())) >= 0) {
        next if $ended > 0;
        die 'programs of a killed process go on: ' . _children() . "\n"
            if Time::HiRes::time() > $deadline;
        Time::HiRes::sleep(0.005);
    }
    File::Path::remove_tree(glob("$ENV{TMPDIR}/pba-server-*"));
    return;
}

sub _children () {
    my @pids = split(' ', slurp("/proc/$$/task/$$/children"));
    return join('; ', map { "$_ " . slurp("/proc/$_/cmdline") =~ tr/\0/ /r } @pids);
}

# Creates a file that leaves only little space.
sub _fill ($self) {
    my $ballast = "$self->{dir}/ballast";
    my $bytes = PVE::BackupAccess::_free_bytes($self->{dir}) - int(rand(700_000));
    open(my $fh, '>', $ballast) or die "$ballast: $!\n";
    PBA::Test::Handle::fallocate($fh, 0, 0, $bytes) or die "fallocate: $!\n";
    close($fh);
    return $ballast;
}

# Starts another process that uses the store at the same time. Returns its PID.
sub _start_beside ($self, $guest) {
    my $store = $self->{store};
    my @names = $self->_names($store, $guest->vmid) or return undef;
    my $what = (qw(verify remove prune))[rand(3)];
    my $name = $names[rand(@names)];
    $store->{archives}{$name}{'may go'} = 1 if $what eq 'remove';
    if ($what eq 'prune') {
        $_->{'may go'} = 1 for map { $store->{archives}{$_} } @names;
    }
    $self->_tell("    beside: $what $name");
    my $wait = rand() < 0.5 ? 0 : 20;
    my $pid = fork() // die "fork: $!\n";
    return $pid if $pid;
    my $provider = $self->_provider($store);
    $provider->wait_for_others($wait);
    eval { $what eq 'prune' ? $provider->prune($guest->vmid, 2) : $provider->$what($name) };
    POSIX::_exit(0);
}

sub _perform_beside ($self, $guest, $mishap, $code) {
    my $pid = ($mishap // '') eq 'beside' ? $self->_start_beside($guest) : undef;
    my $result = $self->_perform($mishap, $code);
    waitpid($pid, 0) if $pid;
    return $result;
}

1;
