package PVE::BackupAccess::Provider::RBD::Ceph;

# Access to a pool, or a namespace of it, by Ceph's own programs: rbd for images, rados for objects.

use v5.36;

use JSON::PP ();

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(write_file);
use PVE::BackupAccess::Program qw(run_program);
use PVE::BackupAccess::Provider::Store::PrivateDir;
use PVE::BackupAccess::Try qw(attempt_any);

my $json = JSON::PP->new->utf8;

my sub fail ($message) { PVE::BackupAccess::Error->throw('SystemError', $message) }

# pool; namespace, undef for the pool's own; conf, the cluster's configuration file.
sub new ($class, %options) {
    return bless({%options}, $class);
}

sub pool ($self) { return $self->{pool} }
sub namespace ($self) { return $self->{namespace} }
sub conf ($self) { return $self->{conf} }

sub place ($self) {
    return defined($self->{namespace}) ? "$self->{pool}/$self->{namespace}" : $self->{pool};
}

# The URI of a snapshot for qemu-img.
sub uri ($self, $image, $snapshot) {
    my ($name, $conf) = map { s/([\\:@])/\\$1/gr } "$image", $self->{conf};
    return 'rbd:' . $self->place . "/$name\@$snapshot:conf=$conf";
}

# A program with the options for the cluster, pool and namespace.
sub command ($self, $program, @arguments) {
    my @in = ('--conf', $self->{conf}, '--pool', $self->{pool});
    push(@in, '--namespace', $self->{namespace}) if defined($self->{namespace});
    return ($program, @in, @arguments);
}

# Runs a program. Returns its exit status, its output and its error message.
sub run ($self, $program, @arguments) {
    my ($status, $out, $message) = run_program($self->command($program, @arguments));
    fail("$program $arguments[0] was ended by signal " . ($status & 127)) if $status & 127;
    return ($status >> 8, $out, $message =~ s/\s+\z//r);
}

# The same, but returns the output, and dies if the program fails. With may_lack, returns undef if there is no such object.
my sub wanted ($self, $may_lack, $program, @arguments) {
    my ($status, $out, $message) = $self->run($program, @arguments);
    return $out if $status == 0;
    my $reason = $message =~ s/\A.*\n//sr || "status $status";
    my $what = join(' ', $program, grep { m/\A[a-z]/ } @arguments[0, 1]);
    return undef if $may_lack && $message =~ m/\(2\) No such file or directory/;
    fail("$what in " . $self->place . " failed - $reason");
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

# Whether the image differs from its snapshot.
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

# { key => value }, undef if there is no such object.
sub values ($self, $object) {
    my $text = $self->try_rados('listomapvals', $object) // return undef;
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

sub make_object ($self, $object) {
    $self->rados('create', $object);
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

# undef if there is no such object.
sub size_of ($self, $object) { return $self->try_rados('stat', $object) }

# How many clients watch the object now.
sub watchers ($self, $object) {
    my $text = $self->try_rados('listwatchers', $object) // return 0;
    return scalar(grep { m/\Awatcher=/ } split(m/\n/, $text));
}

1;
