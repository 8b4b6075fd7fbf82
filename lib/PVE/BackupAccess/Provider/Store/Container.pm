package PVE::BackupAccess::Provider::Store::Container;

# Stores a container's tree in an archive. The user that may read the tree, the container's root,
# may not write to the store. So there are two processes: a keeper, which is started while still
# privileged and holds the archive and its lock, and the caller of feed(), which lets tar write to
# the keeper. The keeper completes the archive only if it gets all data and a confirmation that this
# is all.

use v5.36;

use IO::Select ();
use JSON::PP ();
use POSIX qw(SIG_SETMASK);
use Socket qw(AF_UNIX MSG_NOSIGNAL PF_UNSPEC SOCK_STREAM);

use PVE::BackupAccess;
use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Program qw(fork_child kill_child new_pipe);
use PVE::BackupAccess::Provider::Store::Tar qw(compress start_tar stream_problem);
use PVE::BackupAccess::Try qw(attempt_any deaths_of is_own);
use PVE::BackupAccess::Wait qw(child_ends pause read_some wait_until_readable);

my $Error = 'PVE::BackupAccess::Error';

my $piece = 1 << 18;      # bytes in memory at a time
my $report_every = 60;    # seconds

# How long a keeper may take to remove an incomplete archive, in seconds.
our $longest_end = 60;

my sub fail ($class, $message) { $Error->throw($class, $message) }

my sub socket_pair () {
    local $^F = 2;    # no program inherits them by accident, even if the caller has changed $^F
    socketpair(my $one, my $other, AF_UNIX, SOCK_STREAM, PF_UNSPEC)
        or
        fail('SystemError', "cannot make sockets for the process that stores the container - $!");
    return ($one, $other);
}

# ---- messages: hashes, a line of JSON each ----

# If the other process is gone, this does nothing: the receiver notices.
my sub tell ($self, %message) {
    my $line = JSON::PP->new->ascii->encode(\%message) . "\n";
    while ($line ne '') {
        my $sent = send($self->{control}, $line, MSG_NOSIGNAL);
        return if !defined($sent) && !$!{EINTR};
        substr($line, 0, $sent // 0, '');
    }
    return;
}

# The next message; undef if the other process is gone.
my sub hear ($self) {
    while ($self->{heard} !~ m/\n/) {
        read_some($self->{control}, \$self->{heard}, 65536) or return undef;
    }
    $self->{heard} =~ s/\A(.*)\n//;
    return JSON::PP->new->decode($1);
}

# ---- the keeper ----

# The next part of the stream, undef at its end. Dies unless the caller confirmed that tar has written everything.
my sub next_part ($self) {
    my ($data, $control) = $self->@{qw(data control)};
    while (1) {
        my %ready
            = map { fileno($_) => 1 }
            wait_until_readable($data, $self->{'is complete'} ? () : $control);
        if ($ready{ fileno($data) }) {
            my $got = sysread($data, my $part, $piece);
            next if !defined($got);
            return $part if $got;
            last if $self->{'is complete'};
        }
        my $message = hear($self);
        fail('StateError', 'the backup of the container was given up')
            if !$message || !$message->{complete};
        $self->{'is complete'} = 1;
    }
    return undef;
}

# The same, no faster than $limit bytes a second, with a line in the log every minute.
my sub paced ($self, $limit) {
    my ($began, $size) = (now(), 0);
    my $next_report = $began + $report_every;
    return sub () {
        my $part = next_part($self);
        $size += length($part // '');
        my $now = now();
        pause($began + $size / $limit - $now) if $limit;
        if ($now >= $next_report) {
            tell($self, log => 'container: read ' . bytes($size));
            $next_report = $now + $report_every;
        }
        return $part;
    };
}

my sub seconds_since ($time) { return sprintf('%.1f s', now() - $time) }

my sub store ($self, $archive, $how) {
    my $message = hear($self) // {};
    my $config = $message->{config}
        // fail('StateError', 'the backup of the container was given up');
    utf8::downgrade($config);
    $archive->add_file($how->{config}, $config);
    my $began = now();
    $archive->add_container(sub ($name, $out) { compress($name, $out, paced($self, $how->{limit})) }
    );
    tell($self,
              log => 'container: stored '
            . bytes($archive->container->{size}) . ' as '
            . bytes($archive->container_bytes) . ' in '
            . seconds_since($began));
    return if !$how->{check};
    $began = now();
    my $problem = stream_problem($archive->container_source, $archive->container);
    fail('ContentError', $problem) if defined($problem);
    tell($self, log => 'container: checked in ' . seconds_since($began));
    return;
}

# If the caller has given up the backup in the meantime, the archive must not be published.
my sub check_wanted ($self) {
    fail('StateError', 'the backup of the container was given up')
        if IO::Select->new($self->{control})->can_read(0) && !hear($self);
    return;
}

# Also if a signal ends the work, the incomplete archive is removed.
my sub keep ($self, $archive, $how) {
    my $work = sub (@) {
        POSIX::sigprocmask(SIG_SETMASK, $self->{mask});
        store($self, $archive, $how);
        $archive->seal;
        check_wanted($self);
        $how->{publish}->();
    };
    my ($death) = deaths_of($work);
    $SIG{TERM} = 'IGNORE';
    attempt_any { $how->{discard}->() }
    if $death;
    $how->{unlock}->();
    return tell($self, published => 1) if !$death;
    my $error = $death->[0];
    my $class = is_own($error) ? $error->class : 'SystemError';
    return tell($self, failed => "$error" =~ s/\n\z//r, class => $class);
}

# No exception leaves this, because the code above belongs to the caller.
my sub become_keeper ($self, $archive, $how) {
    $SIG{$_} = 'DEFAULT' for qw(ALRM CHLD HUP INT QUIT USR1 USR2);
    local $SIG{TERM} = sub ($name) {
        $SIG{TERM} = 'IGNORE';
        fail('StateError', 'the backup of the container was given up');
    };

    # A terminal's signals go to the caller only.
    PVE::BackupAccess::_end_with_parent(POSIX::SIGTERM()) and POSIX::setsid();
    deaths_of(sub (@) { keep($self, $archive, $how) });
    POSIX::_exit(0);
}

# Starts the keeper of a new archive. how: config, the name of the file for the guest's configuration; limit, bytes a
# second; check, whether the written data is read back; publish, discard and unlock, code refs. The keeper takes over the
# lock: the caller closes its handle.
sub start ($class, $archive, %how) {
    my ($data, $keepers_data) = socket_pair();
    my ($control, $keepers_control) = socket_pair();

    my $self;
    my $note = sub ($pid) {
        my %self = (pid => $pid, owner => $$, data => $data, control => $control, heard => '');

        # If a handler dies after that, the object ends the keeper, and waits until its sockets are closed.
        close($_) for $keepers_data, $keepers_control;
        $self = bless(\%self, $class);
    };
    my $keep = sub ($mask) {
        close($_) for $data, $control;
        my %keeper
            = (data => $keepers_data, control => $keepers_control, heard => '', mask => $mask);
        become_keeper(\%keeper, $archive, \%how);
    };
    my $problem = fork_child($note, $keep) // return $self;
    fail('SystemError', "cannot start the process that stores the container - $problem");
}

# ---- the keeper's caller, which may be a forked process of another user ----

my sub on_message ($self, $log, $message) {
    fail('StateError', 'the process that stores the container has ended unexpectedly') if !$message;
    fail($message->{class}, $message->{failed}) if defined($message->{failed});
    $log->('info', $message->{log}) if defined($message->{log});
    return $message->{published};
}

# Logs tar's messages until tar closes its standard error. Returns the first one.
my sub listen_to_tar ($self, $log, $messages) {
    my ($text, $first) = ('', undef);
    while (1) {
        for my $handle (wait_until_readable($messages, $self->{control})) {
            if ($handle == $self->{control}) {
                on_message($self, $log, hear($self));
                next;
            }
            my $got = read_some($messages, \$text, 4096);
            return $first if defined($got) && !$got;
            while ($text =~ s/\A(.*)\n//) {
                my $line = $1 =~ s/[[:cntrl:]]/ /agr;
                $first //= $line;
                $log->('warn', "container: $line");
            }
        }
    }
}

# Takes the arguments of backup_container. When it returns, the archive is complete; when it dies, there is no archive.
sub feed ($self, $config, $patterns, $info, $log) {
    local $SIG{CHLD} = 'DEFAULT';    # the caller's may wait for every child
    utf8::encode($config) if utf8::is_utf8($config);
    $log->('info', 'container: storing a full archive');
    my ($messages, $err) = new_pipe();
    my $tar = start_tar($self->{data}, $err, $patterns, $info);
    close($err);
    tell($self, config => $config);
    my $said = listen_to_tar($self, $log, $messages);
    my $problem = $tar->problem;

    if (defined($problem)) {
        tell($self, failed => 1);
        fail('SystemError', "$problem - " . ($said // 'it printed no message'));
    }

    # tar has ended, but the caller's parent may still have this socket open: closing it would not end the stream.
    shutdown($self->{data}, 1);
    tell($self, complete => 1);
    1 while !on_message($self, $log, hear($self));
    return;
}

# Ends the keeper, by a signal if the backup failed, and waits for it. On storage that hangs, it is left behind.
sub end ($self, $success) {
    my $pid = delete($self->{pid}) // return;
    shutdown($self->{control}, 1);
    local ($!, $?);
    kill('TERM', $pid) if !$success && waitpid($pid, POSIX::WNOHANG()) == 0;
    kill_child($pid) if !child_ends($pid, $longest_end);
    return;
}

sub CLONE_SKIP { return 1 }

sub DESTROY ($self) {
    $self->end(0) if $self->{owner} == $$;
    return;
}

1;
