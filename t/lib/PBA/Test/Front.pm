package PBA::Test::Front;

# The front: a monitor with Proxmox' backup access commands, which it carries out on a stock QEMU:
#
#   my $front = PBA::Test::Front->start(
#       qemu_qmp => $path,        # a monitor of the stock QEMU that no other program uses
#       listen => $path,          # the front's own socket
#       form => 'devices',        # or 'devlist': the early form of backup-access-setup
#       pid => $pid,              # of the stock QEMU; needed if a call is to kill it
#   );
#   my $qmp = $front->socket_path;
#   my @names = $front->names;    # of all commands received, in order; commands() has the arguments
#   my $fatal = $front->fatal_call;
#
# Everything else is passed on to and from the stock QEMU: other commands, replies, errors and events. A call
# that would kill or damage a Proxmox QEMU has the same effect here: the stock QEMU gets SIGKILL, the client
# gets no reply, and fatal_call() returns the call. For tests, x-front-native-backup { active => bool } pretends
# that one of Proxmox' own backups is running.

use v5.36;

use parent 'PBA::Test::Peer';

use Errno qw(EINTR);
use JSON::PP ();
use POSIX ();

use PBA::Test::Front::Access ();
use PBA::Test::Front::Exports ();
use PBA::Test::Front::QEMU ();
use PBA::Test::Front::Schema ();

my $json = JSON::PP->new->utf8->canonical->allow_nonref;

my $greeting = {
    QMP => {
        version => {
            qemu => { major => 11, minor => 0, micro => 0 },
            package => 'pve-qemu-kvm_11.0.0-2',
        },
        capabilities => [],
    },
};

# The class with the method for each command.
my %own = (
    'backup-access-setup' => ['access', 'setup'],
    'backup-access-teardown' => ['access', 'teardown'],
    'backup' => ['access', 'backup'],
    'backup-cancel' => ['access', 'backup_cancel'],
    'query-backup' => ['access', 'query_backup'],
    'query-pbs-bitmap-info' => ['access', 'query_bitmap_info'],
    'query-proxmox-support' => ['access', 'query_support'],
    'x-front-native-backup' => ['access', 'pretend_backup'],
    'query-block-exports' => ['exports', 'query_block_exports'],
    'block-export-add' => ['exports', 'block_export_add'],
    'block-export-del' => ['exports', 'block_export_del'],
    'nbd-server-stop' => ['exports', 'nbd_server_stop'],
);

# ---- in the test ----

sub start ($class, %option) {
    for my $name (qw(qemu_qmp listen)) {
        die "PBA::Test::Front needs '$name'\n" if !defined($option{$name});
    }
    $option{form} //= 'devices';
    die "unknown form '$option{form}'\n" if $option{form} !~ /\A(?:devices|devlist)\z/;
    my $self = $class->SUPER::start(%option);
    my $started = eval { $self->wait_for_record('ready', 1, 30); 1 };
    return $self if $started && !$self->records('failed');
    die "the front did not start: ", ($self->records('failed'))[0]{text} // $@, "\n";
}

# The commands received: { execute, arguments, id, connection, time }.
sub commands ($self) { return $self->records('command') }

# Their names, without those of the handshake.
sub names ($self) {
    return grep { $_ ne 'qmp_capabilities' } map { $_->{execute} } $self->commands;
}

# How many times clients have connected and disconnected.
sub connections ($self) { return scalar(() = $self->records('connected')) }
sub disconnections ($self) { return scalar(() = $self->records('closed')) }

# The first call that a Proxmox QEMU would not have survived, or undef: { execute, arguments, why, killed }.
# 'killed' is missing if the damage only shows later.
sub fatal_call ($self) { return ($self->records('fatal'))[0] }

# ---- in the front's process ----

sub _listen ($self) {
    $self->{qemu_pid} = delete($self->{pid});
    return $self->SUPER::_listen;
}

sub serve ($self, $listener) {
    $self->{listener} = $listener;
    my $ok = eval { $self->_start_up; 1 };
    if (!$ok) {
        $self->record('failed', text => _message($@));
        $self->record('ready');
        return;
    }
    $self->record('ready');
    while (1) {
        $self->{qemu}->drain;
        my ($fh) = $self->_wait($self->{client} // $listener, $self->{qemu}->handle);
        if ($fh == $listener) {
            $self->_accept;
        }
        elsif ($self->{client} && $fh == $self->{client}) {
            $self->_read_client;
        }
        else {
            $self->_guarded(sub { $self->{qemu}->read_events });
        }
    }
}

sub _message ($error) { return ref($error) ? $error->{desc} // $error->{gone} : $error }

sub _start_up ($self) {
    $self->{qemu} = PBA::Test::Front::QEMU->connect(
        peer => $self,
        path => $self->{qemu_qmp},
        on_event => sub ($line) { $self->_send($line) if $self->{negotiated} },
    );
    $self->{exports} = PBA::Test::Front::Exports->new($self->{qemu});
    $self->{access} = PBA::Test::Front::Access->new(
        qemu => $self->{qemu},
        exports => $self->{exports},
        form => $self->{form},
        damage => sub ($why) { $self->_record_fatal($why, 0) },
    );
    $self->{schema} = PBA::Test::Front::Schema->new($self->{form});
    return;
}

sub _wait ($self, @handles) {
    while (1) {
        my $ready = '';
        vec($ready, fileno($_), 1) = 1 for $self->{watch}, @handles;
        my $n = select($ready, undef, undef, undef);
        next if $n < 0 && $! == EINTR;
        die "select: $!\n" if $n < 0;
        POSIX::_exit(0) if vec($ready, fileno($self->{watch}), 1);
        return grep { vec($ready, fileno($_), 1) } @handles;
    }
}

# Serves one client at a time, like QEMU: the next one waits in the queue for its greeting.
sub _accept ($self) {
    my $client = $self->{listener}->accept or return;
    $client->blocking(0);
    $self->{client} = $client;
    $self->{negotiated} = 0;
    $self->{parser} = JSON::PP->new->utf8;
    $self->record('connected', connection => ++$self->{connection});
    $self->_send($json->encode($greeting));
    return;
}

sub _drop_client ($self) {
    my $client = delete($self->{client}) // return;
    $self->{negotiated} = 0;
    close($client);
    $self->record('closed', connection => $self->{connection});
    return;
}

sub _send ($self, $line) {
    my $client = $self->{client} // return;
    $line .= "\r\n";
    $self->_drop_client if $self->send_bytes($client, $line) < length($line);
    return;
}

sub _read_client ($self) {
    my $client = $self->{client};
    my $bytes = '';
    return $self->_drop_client if !$self->receive_more($client, \$bytes);
    $self->{parser}->incr_parse($bytes);
    while ($self->{client} && $self->{client} == $client) {
        my $request;
        if (!eval { $request = $self->{parser}->incr_parse; 1 }) {
            $self->{parser} = JSON::PP->new->utf8;
            $self->_send_error({ desc => 'JSON parse error, invalid input' }, {});
            last;
        }
        last if !defined($request);
        $self->_guarded(sub { $self->_handle($request) });
    }
    return;
}

# Runs code that talks to the stock QEMU. If QEMU ends, the front ends too.
sub _guarded ($self, $code) {
    return if eval { $code->(); 1 };
    my $error = $@;
    die $error if ref($error) ne 'HASH' || !exists($error->{gone});
    $self->_end;
}

sub _end ($self) {
    unlink($self->{socket});
    $self->_drop_client;
    POSIX::_exit(0);
}

sub _handle ($self, $request) {
    if (ref($request) ne 'HASH') {
        return $self->_send_error({ desc => 'QMP input must be a JSON object' }, {});
    }
    my $command = $request->{execute};
    if (!defined($command) || ref($command)) {
        return $self->_send_error({ desc => "QMP input lacks member 'execute'" }, $request);
    }
    $self->record(
        'command',
        execute => $command,
        arguments => $request->{arguments} // {},
        id => $request->{id},
        connection => $self->{connection},
    );
    $self->{current} = $request;
    my $reply = eval { $self->_reply($command, $request->{arguments} // {}) };
    return $self->_send(_with_id($reply, $request)) if defined($reply);
    my $error = $@;
    die $error if ref($error) ne 'HASH' || exists($error->{gone});
    $self->_die_of($error->{fatal}) if defined($error->{fatal});
    return $self->_send_error($error, $request);
}

# Returns the text of the reply, without an ID.
sub _reply ($self, $command, $arguments) {
    return $self->_negotiate($command, $arguments) if $command eq 'qmp_capabilities';
    if (!$self->{negotiated}) {
        my $desc = "Expecting capabilities negotiation with 'qmp_capabilities'";
        die { class => 'CommandNotFound', desc => $desc };
    }
    $self->{schema}->check($command, $arguments);
    if (my $own = $own{$command}) {
        my ($who, $method) = @$own;
        my $value = $self->{$who}->$method($arguments);
        $self->_send($json->encode($_)) for $self->{exports}->take_events;
        return $json->encode({ return => $value });
    }
    my $reply = $self->{qemu}->forward($command, $arguments);
    return $self->{schema}->extend($command, $reply);
}

sub _negotiate ($self, $command, $arguments) {
    if ($self->{negotiated}) {
        my $desc = 'Capabilities negotiation is already complete, command ignored';
        die { class => 'CommandNotFound', desc => $desc };
    }
    for my $capability (@{ $arguments->{enable} // [] }) {
        die { desc => "Capability '$capability' not available" };
    }
    $self->{negotiated} = 1;
    return '{"return": {}}';
}

sub _send_error ($self, $error, $request) {
    my %error = (class => $error->{class} // 'GenericError', desc => $error->{desc});
    return $self->_send(_with_id($json->encode({ error => \%error }), $request));
}

sub _with_id ($reply, $request) {
    return $reply if !exists($request->{id});
    my $id = $json->encode($request->{id});
    return $reply =~ s/\A\{/{"id": $id, /r;
}

sub _record_fatal ($self, $why, $killed) {
    my ($command, $arguments) = @{ $self->{current} }{qw(execute arguments)};
    $self->record(
        'fatal',
        execute => $command,
        arguments => $arguments // {},
        why => $why,
        $killed ? (killed => 1) : (),
    );
    return;
}

sub _die_of ($self, $why) {
    $self->_record_fatal($why, 1);
    kill('KILL', $self->{qemu_pid}) if $self->{qemu_pid};
    $self->_end;
}

1;
