package PVE::BackupAccess::Provider::RBD::Ceph;

# Access to a pool, or a namespace of it, by Ceph's own programs: rbd for images, rados for objects.

use v5.36;

use JSON::PP ();

use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(write_file);
use PVE::BackupAccess::Program qw(how_ended run_program);
use PVE::BackupAccess::Provider::Store::PrivateDir;
use PVE::BackupAccess::Try qw(attempt_any);

my $json = JSON::PP->new->utf8;

our $connect_limit = 60;    # seconds, to reach a monitor; Ceph's own limit is 300
our $tell_every = 30;       # the same, while a program waits for the cluster

my sub fail ($message) { PVE::BackupAccess::Error->throw('SystemError', $message) }

# pool; namespace, undef for the pool's own; conf, the cluster's configuration file; user, without 'client.', by default admin; log, a
# code ref.
sub new ($class, %options) {
    return bless({ user => 'admin', %options }, $class);
}

sub pool ($self) { return $self->{pool} }
sub namespace ($self) { return $self->{namespace} }
sub conf ($self) { return $self->{conf} }
sub user ($self) { return $self->{user} }

sub place ($self) {
    return defined($self->{namespace}) ? "$self->{pool}/$self->{namespace}" : $self->{pool};
}

# The URI of a snapshot for qemu-img.
sub uri ($self, $image, $snapshot) {
    my ($name, $user, $conf) = map { s/([\\:@])/\\$1/gr } "$image", $self->@{qw(user conf)};
    my $id = $user eq 'admin' ? '' : ":id=$user";
    return 'rbd:' . $self->place . "/$name\@$snapshot$id:conf=$conf";
}

my sub cluster_command ($self, $program) {
    my @who = ('--conf', $self->{conf}, '--id', $self->{user});
    return ($program, @who, '--client_mount_timeout', $connect_limit);
}

# A program with the options for the cluster, pool and namespace.
sub command ($self, $program, @arguments) {
    my @in = ('--pool', $self->{pool});
    push(@in, '--namespace', $self->{namespace}) if defined($self->{namespace});
    return (cluster_command($self, $program), @in, @arguments);
}

# Programs wait for the cluster as long as it takes: if one were ended, its change could still happen later, after others
# that were made in the meantime. So the log tells what is waited for. Returns a function to be called while a program runs.
sub teller ($self, $what) {
    my $told = now();
    return sub () {
        return if now() - $told < $tell_every;
        $told = now();
        $self->{log}->(
            'warn',
            "$what in rbd:"
                . $self->place
                . ": still waiting for the Ceph cluster of $self->{conf} - check its state with 'ceph -s'"
        );
    };
}

# For messages.
my sub short ($program, @arguments) {
    return join(' ', $program, grep { m/\A[a-z]/ } grep { defined } @arguments[0, 1]);
}

# Runs a program. Returns its exit status, its output and its error message.
sub run ($self, $program, @arguments) {
    my ($status, $out, $message) = run_program($self->teller(short($program, @arguments)),
        $self->command($program, @arguments));
    fail("$program $arguments[0] " . how_ended($status)) if $status & 127;
    return ($status >> 8, $out, $message =~ s/\s+\z//r);
}

# What programs print if they do not get as far as the pool's objects, and what it means.
my @failures = (
    [
        qr/unable to find a keyring|handle_auth_bad_method|\(13\) Permission denied|\(1\) Operation not permitted/,
        'the cluster refuses the user client.USER - check its keyring, which the configuration names, and what it'
            . ' may do (ceph auth get client.USER)'
    ],
    [
        qr/failed to fetch mon config|authenticate timed out|couldn't connect to the cluster/,
        "no monitor of the cluster has answered for SECONDS seconds - check 'mon host' in the configuration, the"
            . " network, and the cluster's state with 'ceph -s'"
    ],
    [
        qr/error opening (?:default )?pool/,
        "there is no such pool - 'ceph osd pool ls' lists the pools"
    ],
);

my sub known_failure ($self, $message) {
    my ($known) = map { $message =~ $_->[0] ? $_->[1] : () } @failures;
    return undef if !defined($known);
    return $known =~ s/SECONDS/$connect_limit/r
        =~ s/USER/$self->{user}/gr . " (configuration: $self->{conf})";
}

# The program's last line. The client's log, such as of another attempt to reach a monitor, goes to the same place, at any time.
my sub last_line ($message) {
    my @lines = split(m/\n/, $message);
    my @own = grep { !m/\A[0-9]{4}-[0-9]{2}-[0-9]{2}T\S+ / } @lines;
    return (@own ? $own[-1] : $lines[-1]) // '';
}

# The same, but returns the output, and dies if the program fails. With may_lack, returns undef if there is no such object.
# A missing keyring or pool also is "No such file or directory", but what cannot be reached must not count as missing.
my sub wanted ($self, $may_lack, $program, @arguments) {
    my ($status, $out, $message) = $self->run($program, @arguments);
    return $out if $status == 0;
    my $known = known_failure($self, $message);
    my $last = last_line($message);
    return undef
        if $may_lack && !defined($known) && $last =~ m/\(2\) No such file or directory/;
    my $reason = $known // ($last ne '' ? $last : "status $status");
    fail(short($program, @arguments) . ' in rbd:' . $self->place . " failed - $reason");
}

sub rbd ($self, @arguments) { return wanted($self, 0, 'rbd', @arguments) }
sub rados ($self, @arguments) { return wanted($self, 0, 'rados', @arguments) }

# The same, but undef if the image or object does not exist.
sub try_rbd ($self, @arguments) { return wanted($self, 1, 'rbd', @arguments) }
sub try_rados ($self, @arguments) { return wanted($self, 1, 'rados', @arguments) }

my sub decode ($program, $text) {
    my $value;
    my $error = attempt_any { $value = $json->decode($text) };
    fail("the output of $program is not valid JSON") if $error;
    return $value;
}

# ---- images ----

sub images ($self) { return decode('rbd', $self->rbd('ls', '--format', 'json'))->@* }

# [{ name, size, protected }] of an image, undef if there is no such image.
sub snapshots ($self, $image) {
    my $text = $self->try_rbd('snap', 'ls', '--format', 'json', $image) // return undef;
    return [
        map {
            {
                name => $_->{name},
                size => 0 + $_->{size},
                protected => ($_->{protected} // '') eq 'true' ? 1 : 0
            }
        } decode('rbd', $text)->@*
    ];
}

# Independent of the cluster's defaults: the lock lets us stop the writes of a dead client, and the object map shows at once
# what has changed.
my $features = 'layering,exclusive-lock,object-map,fast-diff,deep-flatten';

sub create ($self, $image, $size) {
    $self->rbd('create', '--size', "${size}B", '--image-feature', $features, $image);
    return;
}

# Commands that read a new image from standard input, and write a snapshot to standard output. The first has other options for the
# pool and namespace.
sub import_command ($self, $image) {
    my @how = ('--no-progress', '--image-feature', $features);
    return (cluster_command($self, 'rbd'), 'import', @how, '-', $self->place . "/$image");
}

sub export_command ($self, $image, $snapshot) {
    return $self->command('rbd', 'export', '--no-progress', "$image\@$snapshot", '-');
}

sub size_of ($self, $image) {
    return decode('rbd', $self->rbd('info', '--format', 'json', $image))->{size};
}

# A killed client keeps the image's lock for half a minute, until the cluster notices, and writes that it has sent may still
# arrive. If its lock is broken, the cluster refuses them. Call this only if no other process may be writing: the caller
# has the lock for changes.
sub fence ($self, $image) {
    my $text = $self->try_rbd('lock', 'ls', '--format', 'json', $image) // return;
    for my $lock (decode('rbd', $text)->@*) {
        my ($id, $locker) = map {
            m/\A([a-z0-9. ]+)\z/
                ? $1
                : fail(
                "cannot break the lock of image $image - 'rbd lock ls' printed an unexpected value")
        } $lock->@{qw(id locker)};
        $self->try_rbd('lock', 'rm', $image, $id, $locker);
    }
    return;
}

# Whether the image's data differs from that of its snapshot.
sub differs ($self, $image, $snapshot) {
    my @how = ('--whole-object', '--format', 'json', '--from-snap', $snapshot);
    return decode('rbd', $self->rbd('diff', @how, $image))->@* ? 1 : 0;
}

sub roll_back ($self, $image, $snapshot) {
    $self->rbd('snap', 'rollback', '--no-progress', "$image\@$snapshot");
    return;
}

sub snap ($self, $image, $snapshot) {
    $self->rbd('snap', 'create', '--no-progress', "$image\@$snapshot");
    return;
}

sub remove_snapshot ($self, $image, $snapshot) {
    $self->try_rbd('snap', 'rm', '--no-progress', "$image\@$snapshot");
    return;
}

sub remove_image ($self, $image) {
    $self->fence($image);
    $self->try_rbd('rm', '--no-progress', $image);
    return;
}

# ---- objects with values by key ----

# Parses a hex dump: 16 bytes a line, each line with its offset; a '*' stands for repetitions of the line before.
my sub bytes_of ($length, @lines) {
    my ($bytes, $last, $is_repeated) = ('', '', 0);
    for my $line (@lines) {
        if ($line eq '*') {
            $is_repeated = 1;
            next;
        }
        my ($offset, $hex)
            = $line =~ m/\A([0-9a-f]{8,16})((?:\s+[0-9a-f]{2}){0,16})(?:\s+\|.*)?\z/s
            or fail("cannot parse the output of 'rados listomapvals': unexpected line in a value");
        $bytes .= $last while $is_repeated && $last ne '' && length($bytes) < hex($offset);
        $is_repeated = 0;
        $last = pack('H*', $hex =~ s/\s//gr);
        $bytes .= $last;
    }
    fail("cannot parse the output of 'rados listomapvals': a value has a wrong length")
        if length($bytes) != $length;
    return $bytes;
}

# Dies unless the namespace exists: in one that does not exist there are simply no objects. A user of a namespace may not list
# the pool's namespaces.
my sub check_place ($self) {
    return undef if $self->{'is there'};
    fail(
        "there is no namespace $self->{namespace} in pool $self->{pool} - create it, if it is the right one: rbd namespace create "
            . $self->place)
        if defined($self->{namespace}) && !defined($self->try_rbd('ls'));
    $self->{'is there'} = 1;
    return undef;
}

# { key => value }, undef if there is no such object.
sub values ($self, $object) {
    my $text = $self->try_rados('listomapvals', $object);
    return check_place($self) if !defined($text);
    my %values;
    my @lines = split(m/\n/, $text);
    while (@lines) {
        my $key = shift(@lines);
        my ($length) = (shift(@lines) // '') =~ m/\Avalue \(([0-9]+) bytes\) :\z/
            or fail("cannot parse the output of 'rados listomapvals': unexpected line after a key");
        my @value;
        push(@value, shift(@lines)) while @lines && $lines[0] ne '';
        shift(@lines);
        $values{$key} = bytes_of($length, @value);
    }
    return \%values;
}

# Passes the value in a file, because it may be longer than an argument of a program can be.
sub set_value ($self, $object, $key, $value) {
    my $private = PVE::BackupAccess::Provider::Store::PrivateDir->new;
    my $file = $private->path . '/raw';
    write_file($file, $value);
    $self->rados('setomapval', $object, $key, '--input-file', $file);
    return;
}

sub remove_value ($self, $object, $key) {
    $self->try_rados('rmomapkey', $object, $key);
    return;
}

# ---- objects ----

# Unless it exists (rados create would fail then).
sub make_object ($self, $object) {
    $self->rados('touch', $object);
    return;
}

sub put ($self, $object, $file) {
    $self->rados('put', $object, $file);
    return;
}

# Returns whether the object exists.
sub get ($self, $object, $file) {
    return defined($self->try_rados('get', $object, $file)) ? 1 : 0;
}

sub remove_object ($self, $object) {
    $self->try_rados('rm', $object);
    return;
}

# The clients that watch the object now.
sub watchers ($self, $object) {
    my $text = $self->try_rados('listwatchers', $object) // return;
    return map { m/\Awatcher=(\S+ client[.][0-9]+)/ ? $1 : () } split(m/\n/, $text);
}

1;
