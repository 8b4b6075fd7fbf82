package PBA::Test::Client;

# A child process that makes a backup and can be killed at any step:
#
#   my $client = PBA::Test::Client->start(sub ($tell) { ...; $tell->('setup'); ... });
#   while (defined(my $word = $client->next_word)) { ...; $client->let_go_on }
#
# $tell gives the test a word and waits until the client may go on. If a client dies, its last word is the
# error; a client that is killed sends nothing more.

use v5.36;

use POSIX ();

sub start ($class, $code) {
    pipe(my $from_client, my $to_parent) or die "pipe: $!\n";
    pipe(my $from_parent, my $to_client) or die "pipe: $!\n";
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        close($_) for $from_client, $to_client;
        my $tell
            = sub ($text) { syswrite($to_parent, "$text\n"); sysread($from_parent, my $go, 1) };
        eval { $code->($tell); 1 } or syswrite($to_parent, "died: $@");
        POSIX::_exit(0);
    }
    close($_) for $to_parent, $from_parent;
    my %self = (pid => $pid, read => $from_client, write => $to_client, owner => $$);
    return bless(\%self, $class);
}

sub pid ($self) { return $self->{pid} }

# Returns undef when the client has ended.
sub next_word ($self) {
    my $line = readline($self->{read}) // return undef;
    chomp($line);
    return $line;
}

sub let_go_on ($self) {
    local $SIG{PIPE} = 'IGNORE';
    syswrite($self->{write}, '.');
    return;
}

sub wait_end ($self) {
    waitpid($self->{pid}, 0) if $self->{pid};
    delete($self->{pid});
    return;
}

sub kill9 ($self) {
    kill('KILL', $self->{pid}) if $self->{pid};
    $self->wait_end;
    return;
}

sub DESTROY ($self) {
    return if $self->{owner} != $$;
    local ($?, $!);
    $self->kill9;
    return;
}

1;
