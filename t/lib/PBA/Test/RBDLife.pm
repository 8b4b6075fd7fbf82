package PBA::Test::RBDLife;

# A guest without a machine (PBA::Test::StoreLife::Guest), its backups by Provider::RBD, and their expected
# content.
#
#   my $life = PBA::Test::RBDLife->new(ceph => $ceph, dir => $dir);    # in a new namespace; user: that of Ceph
#   $life->write; my $name = $life->backup; my $problem = $life->problem;

use v5.36;

use Digest::SHA qw(sha256_hex);
use FindBin;
use POSIX ();
use Test::More;

use PBA::Test::StoreLife::Guest;
use PBA::Test::Strike qw(strike_at);
use PVE::BackupAccess::Provider::RBD;

$PVE::BackupAccess::Provider::Store::Server::qemu_nbd = $ENV{PBA_QEMU_NBD} // 'qemu-nbd';

my $vmid = 100;

sub new ($class, %options) {
    my $self = bless({ %options, time => 1_795_000_000, log => [], expected => {} }, $class);
    $self->{namespace} //= $self->{ceph}->new_namespace;
    $self->{dir} .= "/$self->{namespace}";
    mkdir($self->{dir}) or die "$self->{dir}: $!\n";
    $self->{guest} = PBA::Test::StoreLife::Guest->new(
        dir => $self->{dir},
        vmid => $vmid,
        uuid => '00000000-0000-0000-0000-000000000100',
        is_aware => 1,
        $options{devices} ? (devices => $options{devices}) : (),
    );
    return $self;
}

# The provider as another process would create it: only the data in the cluster is kept.
sub provider ($self) {
    my $scfg = {
        pool => 'backup',
        namespace => $self->{namespace},
        'ceph-conf' => $self->{ceph}->conf,
        'ceph-user' => $self->{user},
        'state-dir' => "$self->{dir}/state"
    };
    my $log = sub ($level, $message) { push($self->{log}->@*, "$level: $message") };
    return PVE::BackupAccess::Provider::RBD->new(undef, $scfg, 'test', $log);
}

sub guest ($self) { return $self->{guest} }
sub log ($self) { return join("\n", splice($self->{log}->@*)) }
sub names ($self) { return sort keys $self->{expected}->%* }
sub place ($self) { return "backup/$self->{namespace}" }

# The names of all images in the cluster, and of all objects.
sub images ($self) { return split(' ', $self->{ceph}->run('rbd', 'ls', $self->place)) }

sub objects ($self) {
    return split(' ', $self->{ceph}->run('rados', '-p', 'backup', '-N', $self->{namespace}, 'ls'));
}

my sub content_of ($guest) {
    return { map { $_ => $guest->content($_) } $guest->devices };
}

# Makes the calls in the API's order.
my sub perform ($self, $id, $report) {
    my ($provider, $guest) = ($self->provider, $self->{guest});
    $self->{running} = $provider;
    $provider->on_progress($self->{progress}) if $self->{progress};
    $provider->wait_for_others($self->{wait} // 30)
        ;    # a killed backup's workers may still close its images
    $provider->job_init($self->{time});
    my $name = $provider->backup_init($vmid, 'qemu', $self->{time})->{'archive-name'};
    $report->("name $name");
    my @devices = $guest->devices;
    my $done = eval {
        my $modes = $provider->backup_vm_query_incremental($vmid, $guest->asked(@devices));
        my $statuses = $guest->statuses($modes);
        $report->(join(' ', 'statuses', $statuses->%*));
        $guest->begin($statuses);
        my %info = ('backup-id' => $id, 'guest-uuid' => $guest->uuid);
        $provider->backup_vm($vmid, "name: $name\n", $guest->volumes($statuses), \%info);
        1;
    };
    my $error = $@;
    $provider->backup_cleanup($vmid, 'qemu', $done, $done ? {} : { error => $error });
    die $error if !$done;
    return $name;
}

# Returns the archive's name, or dies if the backup failed.
sub backup ($self) {
    my $id = sprintf('%032x', 1 + int(rand(1 << 40)));
    $self->{time} += 60;
    my %said;
    my $content = content_of($self->{guest});
    my $name = perform($self, $id,
        sub ($line) { my ($key, @rest) = split(' ', $line); $said{$key} = \@rest });
    $self->{expected}{$name} = $content;
    $self->{guest}->succeed($id, $self->{guest}->devices);
    $self->{statuses} = { $said{statuses}->@* };
    return $name;
}

# A backup that is killed at the nth call that runs a program, before the nth call of a method of RBD::Ceph, or
# in the nth report of the copies' progress; or that is not killed. If its archive exists, the model adds it.
# Returns where the backup was killed, or undef if it was not.
sub killed_backup ($self, $number, $method = undef) {
    my ($id, $file) = (sprintf('%032x', 1 + int(rand(1 << 40))), "$self->{dir}/report");
    $self->{time} += 60;
    my $content = content_of($self->{guest});
    unlink($file);
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        open(my $out, '>', $file) or POSIX::_exit(1);
        $out->autoflush(1);
        my $report = sub ($line) { print {$out} "$line\n" };
        my $all = $$;    # also if a worker reaches this point
        my $end = sub ($where) { $report->("where $where"); kill(KILL => $all) };
        defined($method) ? _end_at($self, $method, $number, $end) : strike_at($number, $end);
        my $done = eval { perform($self, $id, $report); 1 };
        $report->($done ? 'done' : "died $@");
        POSIX::_exit(0);
    }
    waitpid($pid, 0);
    open(my $in, '<', $file) or return 'at once';
    my %said = map { m/\A(\w+) ?(.*)/ ? ($1 => $2) : () } <$in>;
    close($in);
    $self->{guest}->begin({ split(' ', $said{statuses}) }) if $said{statuses};
    die "a backup that was not killed died: $said{died}\n" if defined($said{died});
    my $name = $said{name};
    my $is_there = defined($name) && grep { $_->{volname} eq $name } $self->provider->list->@*;
    die "the new archive is not there\n" if exists($said{done}) && !$is_there;
    $self->{expected}{$name} = $content if $is_there;
    $self->{guest}->succeed($id, $self->{guest}->devices) if exists($said{done});
    return $said{where};
}

sub _end_at ($self, $method, $number, $end) {
    $self->before($method, $number, sub () { $end->($method) });
    return;
}

# Calls the code before the nth call of a method of RBD::Ceph in this process, or in the nth progress report.
# Returns a function that undoes this.
sub before ($self, $method, $number, $code) {
    if ($method eq 'progress') {
        $self->{progress} = sub (@) { $code->() if !--$number };
        return sub () { delete($self->{progress}) };
    }
    my $class = 'PVE::BackupAccess::Provider::RBD::Ceph';
    my $real = $class->can($method);
    my $wrapped = sub (@arguments) {
        $code->() if !--$number;
        return $real->(@arguments);
    };
    my $set = sub ($sub) {
        no strict 'refs';    ## no critic (ProhibitProlongedStrictureOverride)
        no warnings 'redefine';
        *{"${class}::$method"} = $sub;
    };
    $set->($wrapped);
    return sub () { $set->($real) };
}

# How many of the images differ from the newest archive.
sub different ($self) {
    my ($name) = map { s{.*/}{}r } reverse($self->names);
    my $ceph = $self->provider->{ceph};
    my $guest = $self->provider->_guest("vm/$vmid");
    my $archive = $guest->archive($name);
    return scalar(
        grep { $ceph->differs($_->{image}, $name) }
        map { $archive->device($_) } $archive->devices
    );
}

# The running backup loses its lock, as after a network failure, and another backup runs in between.
sub overtake ($self) {
    my $task = delete($self->{running})->{task};
    $task->{lock}->drop;
    $self->backup;
    return;
}

# Archives that are wrong but not reported: each archive must be intact, or verify and restore must report it as
# damaged.
sub unnamed ($self) {
    my ($provider, @wrong) = ($self->provider);
    for my $name ($self->names) {
        next if !defined(eval { $self->_difference($provider, $name) } // $@ || undef);
        my $damage = eval { join('; ', $provider->verify($name)->@*) } // "$@";
        push(@wrong, "$name: verify finds nothing") if $damage eq '';
    }
    return "@wrong";
}

# { device => new or reuse } of the last backup.
sub statuses ($self) { return $self->{statuses} }

sub forget ($self, @names) {
    delete($self->{expected}->@{@names});
    return;
}

sub restored ($self, $provider, $name, $device, $size) {
    my $uri = $provider->restore_vm_volume_init($name, $device, {})->{'qemu-img-path'};
    my $volume = PVE::BackupAccess::Volume->open($device, { 'nbd-path' => $uri, size => $size });
    my $content = $volume->pread(0, $size);
    $volume->close;
    $provider->restore_vm_volume_cleanup($name, $device, {});
    return $content;
}

# What is wrong with the archives; undef if all are as expected and there are no others. All snapshots are read; with PBA_FULL all
# archives are also restored by the provider, otherwise sometimes one disk.
sub problem ($self, @names) {
    my $provider = $self->provider;
    my @listed = map { $_->{volname} } $provider->list->@*;
    return "there are @listed, not " . join(' ', $self->names)
        if "@listed" ne join(' ', $self->names);
    @names = $self->names if !@names;
    my $difference = $self->_stored_difference($provider, @names);
    return $difference if defined($difference);
    my @all = map {
        my $name = $_;
        map { [$name, $_] } sort keys $self->{expected}{$name}->%*
    } @names;
    my @some = $ENV{PBA_FULL} ? @all : @all && rand() < 0.25 ? $all[rand(@all)] : ();
    ($difference) = map { $self->_difference($provider, $_->@*) // () } @some;
    return $difference;
}

# The same, but only reads what is in the cluster.
sub _stored_difference ($self, $provider, @names) {
    my %stored = split(
        ' ',
        $self->{ceph}->run(
            "$FindBin::Bin/rbd-contents.py",
            $self->{ceph}->conf,
            'backup', $self->{namespace}
        )
    );
    my $guest = $provider->_guest("vm/$vmid");
    for my $name (@names) {
        my ($expected, $archive) = ($self->{expected}{$name}, $guest->archive($name =~ s{.*/}{}r));
        return "$name has other devices"
            if "@{[$archive->devices]}" ne "@{[sort keys $expected->%*]}";
        for my $device ($archive->devices) {
            my $snapshot = $archive->device($device)->{image} . '@' . $archive->name;
            return "$name has another $device"
                if ($stored{$snapshot} // '') ne sha256_hex($expected->{$device});
        }
    }
    return undef;
}

# What a restore of the archive, or of some of its devices, finds.
sub _difference ($self, $provider, $name, @devices) {
    my $expected = $self->{expected}{$name};
    my $sizes = $provider->restore_vm_init($name);
    for my $device (@devices ? @devices : sort keys $expected->%*) {
        my $content = $expected->{$device};
        return "$name has another $device"
            if ($sizes->{$device}{size} // -1) != length($content)
            || $self->restored($provider, $name, $device, length($content)) ne $content;
    }
    return "$name has another configuration"
        if $provider->archive_get_guest_config($name) ne "name: $name\n";
    return undef;
}

1;
