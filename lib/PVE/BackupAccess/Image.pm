package PVE::BackupAccess::Image;

use v5.36;

use Digest::SHA qw(sha256_hex);
use Fcntl qw(S_ISBLK);
use IO::Socket::UNIX ();
use JSON::PP ();

use PVE::BackupAccess;
use PVE::BackupAccess::Argument
    qw(bad_argument check_filled_text check_hash check_options check_positive);
use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Image::InUse qw(check_unused);
use PVE::BackupAccess::Program qw($longest_socket how_ended start_program);
use PVE::BackupAccess::Provider::Store::PrivateDir;
use PVE::BackupAccess::Reply qw(is_refusal);
use PVE::BackupAccess::Try qw(attempt);
use PVE::BackupAccess::Wait qw(child_ends wait_for_child);

our $qemu_storage_daemon = 'qemu-storage-daemon';

my $json = JSON::PP->new->ascii->canonical;
my $no_uuid = '00000000-0000-0000-0000-000000000000';
my $seconds_to_start = 60;
my $seconds_between_looks = 0.01;
my $seconds_to_fail = 1;

my sub fail ($message) {
    PVE::BackupAccess::Error->throw('SystemError', $message);
}

my %disk_keys = (
    device => \&check_filled_text,
    file => \&check_filled_text,
    format => sub ($name, $value) {
        bad_argument("$name must be qcow2 or raw, not '" . ($value // 'undef') . q('))
            if ($value // '') !~ m/\A(?:qcow2|raw)\z/;
    },
);

my %options = (
    disks => sub ($name, $value) {
        bad_argument("$name must be a list of disks, not empty")
            if ref($value) ne 'ARRAY' || !$value->@*;
        check_hash("a disk of $name", $_, \%disk_keys) for $value->@*;
    },
    name => \&check_filled_text,
    uuid => \&check_filled_text,
    timeout => \&check_positive,
);

# The name of the disk's block node: the disk's own name where it is valid as a node name, otherwise a name that
# no disk has, and that the core does not take for the disk's (is_numbered in src/qemu/block.c).
my sub node_name ($index, @disks) {
    my $device = $disks[$index]{device};
    return $device if $device =~ m/\A[A-Za-z][A-Za-z0-9._-]{0,30}\z/;
    my %is_device = map { $_->{device} => 1 } @disks;
    my $name = "unnamed-$index";
    $name .= '-' while $is_device{$name};
    return $name;
}

my sub node_options ($disk) {
    my $is_device = S_ISBLK((stat($disk->{file}))[2]);
    utf8::decode(my $file = $disk->{file})
        or fail("$disk->{file}: the path is not UTF-8, as QEMU wants it - use a link to the image");
    return $json->encode(
        {
            driver => $disk->{format},
            'node-name' => $disk->{node},
            discard => 'unmap',
            file => {
                driver => $is_device ? 'host_device' : 'file',
                filename => $file,
                discard => 'unmap',
            },
        }
    );
}

# ---- the process ----

# Neither QEMU nor the kernel accepts a longer path for a socket.
my sub check_socket ($path) {
    fail(
        "cannot make the socket $path - its path has more than $longest_socket bytes, so set TMPDIR to another directory"
    ) if length($path) > $longest_socket;
    return $path;
}

my sub run_daemon ($self, @arguments) {
    my $log = $self->{private}->path . '/log';
    open(my $fh, '>', $log) or fail("cannot open $log - $!");
    start_program(\$self->{pid}, { out => $fh, err => $fh }, $qemu_storage_daemon, @arguments);
    return;
}

my sub log_line ($self) {
    open(my $fh, '<', $self->{private}->path . '/log') or return '';
    my ($line) = <$fh>;
    return ($line // '') =~ s/\A\S*qemu-storage-daemon: (?:--blockdev \{.*\}: )?//r =~ s/\s+\z//r;
}

# Only words tell that another QEMU has an image (QEMU 7.2 to 11.0).
my sub fail_to_open ($self) {
    my $line = log_line($self);
    my $class = $line =~ m/Failed to get .* lock/ ? 'StateError' : 'SystemError';
    PVE::BackupAccess::Error->throw($class, "cannot open the images - $line");
}

# Whether it has ended. If it is about to end, it has that many seconds.
my sub has_ended ($self, $seconds = 0) {
    local ($!, $?);
    return 0 if !child_ends($self->{pid}, $seconds);
    delete($self->{pid});
    return 1;
}

my sub ask ($self, $command, $arguments) {
    my $value;
    my $error = attempt {
        $value = PVE::BackupAccess::_ask($self->{socket}, $self->{timeout}, $command, $arguments,
            undef)
    };
    return $value if !defined($error);
    die $error if !is_refusal($error);
    die "$error" =~ s/\Aqmp command '[^']*' failed - //r;
}

# Whether the image's bitmap belongs to the disk with that identity, of which its companion's name has a hash.
my sub has_bitmap_of ($disk, $identity) {
    utf8::encode($identity);
    my $hash = substr(sha256_hex($identity), 0, 8);
    return grep { m/\Apba-id:[0-9a-f]+:[0-9a-f]+:$hash:/ } $disk->{companions}->@*;
}

# Makes the answers to queries say that the disk is this drive, or the disk of this guest device.
my sub identify_as ($disk, $identity) {
    my ($kind, $name) = $identity =~ m/\A(drive|device) (.+)\z/s or return;
    $disk->{drive} = $kind eq 'drive' ? $name : '';
    $disk->{qdev} = $kind eq 'drive' ? $disk->{device} : $name;
    return;
}

# In the guest's QEMU, a disk is a drive, or a node attached to a guest device.
my sub find_drives ($self) {
    my %node = map { $_->{'node-name'} => $_ } ask($self, 'query-named-block-nodes', {})->@*;
    for my $disk ($self->{disks}->@*) {
        my @bitmaps = map { $_->{name} // '' } ($node{ $disk->{node} }{'dirty-bitmaps'} // [])->@*;
        $disk->{companions} = [grep { m/\Apba-id:/ } @bitmaps];
        my ($device, $drive) = map { "$_ $disk->{device}" } 'device', 'drive';
        identify_as($disk, has_bitmap_of($disk, $drive) ? $drive : $device);
    }
    return;
}

# identities: { device => [identities that the disk of this name had in archives, the newest first] }. The bitmap in
# the image shows which one is right. Without a bitmap, it is the newest: the data is compared in any case.
sub _identify ($self, $identities) {
    for my $disk ($self->{disks}->@*) {
        my @known = ($identities->{ $disk->{device} } // [])->@*;
        @known = grep { has_bitmap_of($disk, $_) } @known if $disk->{companions}->@*;
        identify_as($disk, $known[0]) if @known;
    }
    return;
}

# QEMU must not guess the format of a backing file either: a guest that wrote to it may have written a header
# that names another file. Writing to a backing file changes the disk, so no process may have it open for
# writing.
my sub check_backing ($self) {
    my %node = map { $_->{'node-name'} => $_ } ask($self, 'query-named-block-nodes', {})->@*;
    for my $disk ($self->{disks}->@*) {
        my $image = $node{ $disk->{node} }{image};
        while (defined(my $name = $image->{'backing-filename'})) {
            fail("$image->{filename}: the format of its backing file $name is not recorded in it -"
                    . " record it with 'qemu-img rebase -u -b FILE -F FORMAT'")
                if !defined($image->{'backing-filename-format'});
            $image = $image->{'backing-image'} // last;
            utf8::encode(my $file = $image->{filename});
            check_unused($file) if -e $file;
        }
    }
    return;
}

my sub wait_until_up ($self) {
    my $deadline = now() + $seconds_to_start;
    until (IO::Socket::UNIX->new(Peer => $self->{socket})) {
        fail_to_open($self) if has_ended($self, $seconds_between_looks);
        fail("$qemu_storage_daemon did not start within $seconds_to_start seconds")
            if now() > $deadline;
    }
    return;
}

sub start ($class, @options) {
    my $given = check_options('start', \@options, \%options, 'disks');
    my @disks = map { +{ $_->%* } } $given->{disks}->@*;
    my %seen;
    for my $disk (@disks) {
        defined($disk->{$_}) or bad_argument("a disk of disks lacks '$_'") for sort keys %disk_keys;
        bad_argument("disk '$disk->{device}' is given twice") if $seen{ $disk->{device} }++;
        check_unused($disk->{file});
    }
    my $self = bless({ timeout => 60, $given->%*, disks => \@disks, owner => $$ }, $class);
    $self->{private} = PVE::BackupAccess::Provider::Store::PrivateDir->new;
    $self->{socket} = check_socket($self->{private}->path . '/qmp');
    $disks[$_]->@{qw(id node)} = ($_, node_name($_, @disks)) for 0 .. $#disks;
    local $^F = 2;
    my $path = $self->{socket} =~ s/,/,,/gr;
    run_daemon($self, '--chardev', "socket,id=monitor,path=$path,server=on,wait=off",
        '--monitor', 'chardev=monitor', map { ('--blockdev', node_options($_)) } @disks);
    wait_until_up($self);

    # The process accepts connections before it has opened the images.
    my $error = attempt { find_drives($self) };
    die $error if $error && !has_ended($self, $seconds_to_fail);
    fail_to_open($self) if $error;
    check_backing($self);
    return $self;
}

# When this returns, the persistent bitmaps have been saved in the images.
sub stop ($self) {
    my $pid = delete($self->{pid}) // return;
    local $SIG{CHLD} = 'DEFAULT';    # the caller's handler may wait for every child
    kill(TERM => $pid);
    local $?;
    my $status = wait_for_child($pid);
    return if defined($status) && $status == 0;
    my @said = grep { $_ ne '' } log_line($self);
    fail(join(' - ', "$qemu_storage_daemon " . how_ended($status), @said));
}

sub CLONE_SKIP { return 1 }

sub DESTROY ($self) {
    return if $self->{owner} != $$;
    local ($@, $!);
    my $error = attempt { $self->stop };
    warn $error if defined($error);
    return;
}

# ---- QMP ----

my sub path_of ($disk) {
    return $disk->{qdev} =~ m!\A/! ? $disk->{qdev} : "/machine/peripheral/$disk->{qdev}";
}

my sub disk_at ($self, $path) {
    my ($disk) = grep { path_of($_) eq $path } $self->{disks}->@*;
    return $disk // die "Device '$path' not found\n";
}

my sub devices ($self) {
    my %node = map { $_->{'node-name'} => $_ } ask($self, 'query-named-block-nodes', {})->@*;
    return [
        map {
            +{
                device => $_->{drive},
                'given-name' => $_->{device},
                qdev => $_->{qdev},
                locked => JSON::PP::false,
                removable => JSON::PP::false,
                type => 'unknown',
                inserted => $node{ $_->{node} },
            }
        } $self->{disks}->@*
    ];
}

# Adds the guest devices as they would be in a guest: block backends that allow no other user to write.
my sub graph ($self) {
    my $graph = ask($self, 'x-debug-query-block-graph', {});
    my %id = map { $_->{name} => $_->{id} } $graph->{nodes}->@*;
    for my $disk ($self->{disks}->@*) {
        my $id = (1 << 40) + $disk->{id};
        my $name = $disk->{drive} ne '' ? $disk->{drive} : $disk->{qdev};
        push($graph->{nodes}->@*, { id => $id, type => 'block-backend', name => $name });
        push(
            $graph->{edges}->@*,
            {
                parent => $id,
                child => $id{ $disk->{node} },
                name => 'root',
                perm => ['consistent-read'],
                'shared-perm' => ['consistent-read', 'write-unchanged'],
            }
        );
    }
    return $graph;
}

# Commands that a guest's QEMU knows and the storage daemon does not.
my %answers = (
    'query-name' => sub ($self, $arguments) { return { name => $self->{name} // '' } },
    'query-uuid' => sub ($self, $arguments) { return { UUID => $self->{uuid} // $no_uuid } },
    'query-status' => sub ($self, $arguments) {
        return { status => 'paused', running => JSON::PP::false };
    },
    'query-migrate' => sub ($self, $arguments) { return {} },
    'query-iothreads' => sub ($self, $arguments) { return [] },
    'query-block' => sub ($self, $arguments) { return devices($self) },
    'x-debug-query-block-graph' => sub ($self, $arguments) { return graph($self) },
    'qom-list' => sub ($self, $arguments) {
        return [map { +{ name => $_->{qdev}, type => 'child<image>' } } $self->{disks}->@*];
    },
    'qom-get' => sub ($self, $arguments) {
        disk_at($self, $arguments->{path});
        die "Property '.$arguments->{property}' not found\n";
    },
    'qom-set' => sub ($self, $arguments) {
        my $disk = disk_at($self, $arguments->{path});
        $disk->{node} = $arguments->{value};
        return {};
    },
);

# Returns a code ref for the option qmp. The code ref keeps the object alive.
sub qmp ($self) {
    return sub ($command, $arguments) {
        my $answer = $answers{$command};
        return $answer ? $answer->($self, $arguments) : ask($self, $command, $arguments // {});
    };
}

sub devices_of ($self) {
    return map { $_->{device} } $self->{disks}->@*;
}

1;

__END__

=encoding utf8

=head1 NAME

PVE::BackupAccess::Image - access to the disks of a guest that is off

=head1 SYNOPSIS

=for run images

    use PVE::BackupAccess::Image;
    use PVE::BackupAccess::Task;

    my $image = PVE::BackupAccess::Image->start(
        disks => [{ device => 'drive-scsi0', file => $file, format => 'qcow2' }],
        uuid => $uuid,    # as the guest has it when it runs
    );
    my $task = PVE::BackupAccess::Task->new(
        qmp => $image->qmp,
        persistent => 1,
        'fleecing-dir' => $fleecing_dir,
        devices => [$image->devices_of],
        $options->%*,     # vmid, provider, guest-config and so on
    );
    $task->run_job;
    $image->stop;

=head1 DESCRIPTION

A guest that is off has no QEMU to ask. This module starts a C<qemu-storage-daemon>, which opens the images and executes
the same commands. The module itself answers the commands for what a guest has and the daemon lacks, such as devices. The
disks' content is not changed. Persistent bitmaps of qcow2 images are read, and updated as in any other backup. So an
increment can follow a backup of the running guest, and the next backup of the running guest can follow this one. Bitmaps
of raw images do not persist, so each backup of a raw image is a full one.

While the daemon runs, no QEMU can open the images for writing, so the guest cannot start.

=head1 ERRORS

The methods die with a L<PVE::BackupAccess::Error>.

=head1 METHODS

=head2 start

=for run images

    use PVE::BackupAccess::Image;

    my $image = PVE::BackupAccess::Image->start(
        disks => [{ device => 'drive-scsi0', file => $file, format => 'qcow2' }],
        uuid => $uuid,
        timeout => 30,
    );
    $image->stop;

Starts the daemon, opens the images and returns the object. The options are:

=over

=item C<disks> - required: an array ref of hashes with C<device>, the name that the guest's device has when it runs;
C<file>, the image or block device; and C<format>, C<qcow2> or C<raw>. The format is never guessed, because the guest of a
raw image could write a qcow2 header to it. For the same reason, an image must record the format of its backing file.

=item C<uuid>, C<name> - of the guest. An increment needs the UUID that the guest had at the previous backup.

=item C<timeout> - seconds that a command may take. The default is 60.

=back

Errors: C<ArgumentError> if an option is unknown, missing or wrong; C<StateError> if a file is open for writing in another
process; C<SystemError> if a file cannot be opened, if the daemon cannot be started, or if it cannot open the images.

=head2 qmp

=for run images

    use PVE::BackupAccess;
    use PVE::BackupAccess::Image;

    my $image = PVE::BackupAccess::Image->start(
        disks => [{ device => 'drive-scsi0', file => $file, format => 'qcow2' }]);
    my $access = PVE::BackupAccess->new(
        qmp => $image->qmp,
        'target-id' => 'nightly',
        'fleecing-dir' => $fleecing_dir,
    );
    my $sizes = $access->sizes($image->devices_of);
    $image->stop;

Returns a code ref for the option C<qmp> of L<PVE::BackupAccess/new> and L<PVE::BackupAccess::Task/new>. Takes no
arguments. The code ref dies with QEMU's error as text, or with C<ConnectionError>, C<TimeoutError> or C<ProtocolError>.

=head2 devices_of

=for run images

    use PVE::BackupAccess::Image;

    my $image = PVE::BackupAccess::Image->start(
        disks => [{ device => 'drive-scsi0', file => $file, format => 'qcow2' }]);
    say for $image->devices_of;
    $image->stop;

Returns the names of the disks, as a list. Takes no arguments.

=head2 stop

=for run images

    use PVE::BackupAccess::Image;

    my $image = PVE::BackupAccess::Image->start(
        disks => [{ device => 'drive-scsi0', file => $file, format => 'qcow2' }]);
    $image->stop;

Closes the images and ends the daemon. Takes no arguments. The daemon stores persistent bitmaps when it ends. A second call
does nothing. If the object goes out of scope, it is stopped, and an error becomes a warning.

Errors: C<SystemError> if the daemon ends with an error. The bitmaps may then not be stored, and the next backup is a full
one.

=cut
