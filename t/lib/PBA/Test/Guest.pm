package PBA::Test::Guest;

# The agent in the test guest (t/guest/agent.c), which executes one command line at a time.

use v5.36;

use Time::HiRes ();

use PBA::Test::Channel qw(now);

sub new ($class, %opt) {
    my $channel = PBA::Test::Channel->new(
        path => $opt{path},
        what => 'guest agent',
        alive => $opt{alive},
    );
    return bless { channel => $channel, id => 0, timeout => 60 }, $class;
}

# Waits until the guest has booted and the agent answers. Returns the same as hello().
sub wait_ready ($self, $timeout) {
    my $deadline = now() + $timeout;
    while (1) {
        my $left = $deadline - now();
        my $line = $left > 0 ? $self->{channel}->read_line($left) : undef;
        die "guest agent: not ready within $timeout s\n" if !defined $line;
        last if $line eq 'ready';
    }
    return $self->hello;
}

# Sends a command and returns the text after "ok "; dies with the text after "error ".
sub command ($self, @words) {
    my $id = $self->send(@words);
    return $self->receive($id, "@words");
}

# The two halves of command(), for a command that is to run while something else happens.
sub send ($self, @words) {
    my $id = ++$self->{id};
    $self->{channel}->send_line("$id @words");
    return $id;
}

sub receive ($self, $id, $what = 'command', $timeout = $self->{timeout}) {
    my $deadline = now() + $timeout;
    while (1) {
        my $left = $deadline - now();
        my $line = $self->{channel}->read_line($left > 0 ? $left : 0)
            // die "guest agent: no answer to '$what' within $timeout s\n";
        my ($of, $status, $text) = $line =~ /\A(\d+) (ok|error) ?(.*)\z/s;
        next if !defined $of || $of != $id;
        return $text if $status eq 'ok';
        die "guest agent: $what: $text\n";
    }
}

# Returns { version => ..., disks => { id => size } }.
sub hello ($self) {
    my %values = map { split /=/ } split ' ', $self->command('hello');
    my $version = delete $values{version};
    return { version => $version, disks => \%values };
}

sub write ($self, $disk, $offset, $length, $byte) {
    $self->command('write', $disk, $offset, $length, $byte);
    return;
}

sub trim ($self, $disk, $offset, $length) {
    $self->command('trim', $disk, $offset, $length);
    return;
}

sub zero ($self, $disk, $offset, $length) {
    $self->command('zero', $disk, $offset, $length);
    return;
}

# Reads from a disk in the guest (at most 32 KiB).
sub read ($self, $disk, $offset, $length) {
    return pack 'H*', $self->command('read', $disk, $offset, $length);
}

# The sum modulo 2**64 of the big-endian 32 bit words of the disk or a range, like unpack('%64N*', $data).
sub read_sum ($self, $disk, @range) {
    return 0 + $self->command('read-sum', $disk, @range);
}

# seed, disks => [ids]; optional: blocks (only the first N 4 KiB blocks of each disk), first (the number of the
# first write, to continue an earlier churn), pause_us between writes.
sub start_churn ($self, %opt) {
    $self->command(
        'churn-start',
        $opt{seed} // 1,
        join(',', $opt{disks}->@*),
        $opt{blocks} // 0,
        $opt{first} // 1,
        $opt{pause_us} // 4000,
    );
    return;
}

# Returns the number of the last write; in list context also the writes per second.
sub stop_churn ($self) {
    my ($last, $rate) = split ' ', $self->command('churn-stop');
    return wantarray ? ($last, $rate) : $last;
}

sub churn_status ($self) {
    my ($last, $rate) = split ' ', $self->command('churn-status');
    return { last => $last, rate => $rate };
}

# Waits until write number $s is done. Returns the number of the last write at that time.
sub wait_churn ($self, $s, $timeout = 60) {
    my $deadline = now() + $timeout;
    while (1) {
        my $last = $self->churn_status->{last};
        return $last if $last >= $s;
        die "guest agent: churn at write $last, not $s, after $timeout s\n"
            if now() > $deadline;
        Time::HiRes::sleep(0.02);
    }
}

# Like wait_churn, but counts from now.
sub wait_more_churn ($self, $count, $timeout = 60) {
    return $self->wait_churn($self->churn_status->{last} + $count, $timeout);
}

# The latency of churn writes since the last call: { longest_us, write_us, flush_us, count, p50_us, p99_us }.
sub latency ($self) {
    return { map { split /=/ } split ' ', $self->command('latency') };
}

sub mount ($self, $disk) {
    $self->command('mount', $disk);
    return;
}

sub umount ($self) {
    $self->command('umount');
    return;
}

sub sync ($self) {
    $self->command('sync');
    return;
}

sub start_files ($self) {
    $self->command('files-start');
    return;
}

# Returns the number of operations done.
sub stop_files ($self) {
    return $self->command('files-stop');
}

# Runs a shell command (busybox) in the guest. Returns its exit status and output.
sub sh ($self, $command) {
    my ($status, $output) = split / /, $self->command('sh', $command), 2;
    $output =~ s/\\x([0-9a-f]{2})/chr hex $1/ge;
    return ($status, $output);
}

sub close ($self) {
    $self->{channel}->close;
    return;
}

1;
