package PBA::Test::StoreLife;

# A random life of a store of Qcow2Chain and of copies of it: backups of two guests, prunes and removals, in
# which things go wrong: the process is killed, a call fails, the disk is full, a bit is flipped, or another
# process uses the store. A model knows the expected content of each archive. There is no machine: the data
# comes from files.
#
#   my $life = PBA::Test::StoreLife->new(seed => 1, dir => $dir, scratch => $other, is_mounted => 1);
#   my $problem = $life->step for 1 .. 100;    # undef: no problem
#
# The stores are in dir. is_mounted says that dir is a file system of its own, which can be filled and made
# read-only. StoreLife::Clones is a subclass for another provider.

use v5.36;

use File::Path ();
use JSON::PP ();
use Time::Local ();

use PBA::Test::StoreLife::Guest;
use PBA::Test::StoreLife::Image qw(forget state_of);
use PBA::Test::StoreLife::Judge qw(judge looks_right);
use PBA::Test::StoreLife::Kept qw(keep keep_in);
use PBA::Test::StoreLife::Mishaps;
use PBA::Test::StoreLife::Rot qw(flip_bit);
use PVE::BackupAccess::Provider::Qcow2Chain;
use PVE::BackupAccess::Retention ();

use parent -norequire, 'PBA::Test::StoreLife::Mishaps';

$PVE::BackupAccess::Provider::Qcow2Chain::Image::qemu_img = $ENV{PBA_QEMU_IMG} // 'qemu-img';
$PVE::BackupAccess::Provider::Store::Server::qemu_nbd = $ENV{PBA_QEMU_NBD} // 'qemu-nbd';

my $Guest = 'PBA::Test::StoreLife::Guest';
my $Provider = 'PVE::BackupAccess::Provider::Qcow2Chain';
my $json = JSON::PP->new->utf8->allow_nonref;

# [weight, event]
my @events = (
    [30, \&_one_backup],
    [14, \&_one_removal],
    [5, \&_one_prune],
    [5, \&_flip],
    [4, \&_look],
    [2, \&_move],
    [2, \&_copy],
    [2, \&_other_store],
    [2, \&_read_only],
    [1, \&_resize],
    [1, \&_lose_bitmap],
);

# The mishaps during a backup, a prune or a removal.
my @mishaps = (
    [60, undef],
    [10, 'killed'],
    [5, 'killed any time'],
    [5, 'a call fails'],
    [4, 'full'],
    [5, 'flip'],
    [4, 'beside'],
);

my sub choose (@weighted) {
    my $sum = 0;
    $sum += $_->[0] for @weighted;
    my $at = rand($sum);
    for my $choice (@weighted) {
        return $choice->[1] if ($at -= $choice->[0]) < 0;
    }
    return $weighted[-1][1];
}

my sub any (@of) { return $of[rand(@of)] }

sub new ($class, %options) {
    my $self = bless({ %options, time => 1_795_000_000, steps => 0, count => {} }, $class);
    mkdir($_) for "$self->{dir}/store-1", "$self->{scratch}/content";
    keep_in("$self->{scratch}/content");
    forget();
    $self->{stores} = [{ path => "$self->{dir}/store-1", archives => {} }];
    $self->{store} = $self->{stores}[0];
    for my $about ([100, 1], [101, 0]) {
        my ($vmid, $is_aware) = $about->@*;
        $self->{guests}{$vmid} = $Guest->new(
            dir => $self->{scratch},
            vmid => $vmid,
            uuid => "00000000-0000-0000-0000-000000000$vmid",
            is_aware => $is_aware,
        );
    }
    return $self;
}

sub count ($self) { return $self->{count} }
sub log ($self) { return join("\n", $self->{log}->@*) }

sub _tell ($self, $text) {
    push($self->{log}->@*, "$self->{steps}: $text");
    splice($self->{log}->@*, 0, -60);
    return;
}

# Runs the next event. Returns what is wrong after it, or undef if nothing is wrong.
sub step ($self) {
    srand($self->{seed} * 10_007 + ++$self->{steps});
    my $event = choose(@events);
    my $vmid = $self->{vmid} = any(sort keys $self->{guests}->%*);
    $self->{mishap} = undef;
    my $problem = $event->($self, $self->{guests}{$vmid});
    $problem //= $self->_check($_) for $self->{stores}->@*;
    return $problem;
}

# ---- one store ----

sub _class ($self) { return $Provider }

sub _provider ($self, $store = $self->{store}) {
    my $log = sub ($level, $message) {
        $self->_tell("    $level: $message") if $level ne 'info';
    };
    my $state = "$self->{scratch}/state";
    my $provider
        = $self->_class->new(undef, { path => $store->{path}, 'state-dir' => $state }, 'test',
        $log);
    $provider->jobs(1);
    return $provider;
}

sub _is_listed ($self, $store, $name) { return -e "$store->{path}/$name/manifest.json" }

# The names of the guest's archives in the model, oldest first.
sub _names ($self, $store, $vmid) {
    return grep { m{\Avm/$vmid/} } sort keys $store->{archives}->%*;
}

sub _is_spoilt ($self, $store, $vmid) {
    return grep { $store->{archives}{$_}{spoilt}->%* } $self->_names($store, $vmid);
}

sub _mishap ($self) {
    return $self->{'only mishap'} if $self->{'only mishap'};
    return choose(grep { $self->{is_mounted} || ($_->[1] // '') ne 'full' } @mishaps);
}

# An operation must not fail if nothing went wrong during it, and nothing was spoilt before.
sub _must_succeed ($self, $guest, $result, $what) {
    return undef if !defined($result->{died}) || defined($self->{mishap});
    return undef if $self->_is_spoilt($self->{store}, $guest->vmid);
    return "$what failed: $result->{died}";
}

# ---- events ----

sub _one_backup ($self, $guest) {
    $guest->write_random(4);
    my @devices = grep { rand() < 0.4 } $guest->devices;
    @devices = any($guest->devices) if !@devices;
    my %how = (
        devices => \@devices,
        time => $self->{time} += any(0, 1, 60, 3600, 86_400, 1_000_000, -50_000),
        id => sprintf('%032x', 1 + int(rand(1 << 40))),
        full => rand() < 0.05,
        compress => rand() < 0.05,
        late => rand() < 0.05,
        'no-check' => rand() < 0.05,
        jobs => rand() < 0.1 ? 2 : 1,
        wait => any(0, 20),
    );
    my $mishap = $self->_mishap;
    $self->_tell("backup of $guest->{vmid} (@devices) in $self->{store}{path}, " . ($mishap // ''));
    my $content = { map { $_ => keep($guest->content($_)) } @devices };
    my $result = $self->_perform_beside($guest, $mishap,
        sub ($report) { _back_up($self->_provider, $guest, $report, %how) });
    $guest->begin($result->{statuses}) if $result->{statuses};
    my $problem = $self->_note_backup($guest, $result, $content);
    $guest->succeed($how{id}, @devices) if $result->{done} && !$how{late};
    return $problem // $self->_must_succeed($guest, $result, 'the backup');
}

sub _back_up ($provider, $guest, $report, %how) {
    my $vmid = $guest->vmid;
    $provider->{'no-check'} = $how{'no-check'};
    $provider->wait_for_others($how{wait});
    $provider->make_full($how{full});
    $provider->compress($how{compress}) if $provider->can('compress');
    $provider->job_init($how{time});
    my $name = $provider->backup_init($vmid, 'qemu', $how{time})->{'archive-name'};
    $report->(name => $name);
    my $done = eval {
        my $modes = $provider->backup_vm_query_incremental($vmid, $guest->asked($how{devices}->@*));
        my $statuses = $guest->statuses($modes);
        $report->(statuses => $statuses);
        $guest->begin($statuses);
        my %info = $guest->is_aware ? ('backup-id' => $how{id}, 'guest-uuid' => $guest->uuid) : ();
        $info{jobs} = $how{jobs};
        $provider->backup_vm($vmid, "name: $name\n", $guest->volumes($statuses), \%info);
        1;
    };
    my $error = $@;
    my $success = $done && !$how{late};
    $provider->backup_cleanup($vmid, 'qemu', $success, $success ? {} : { error => $error });
    die $error if !$done;
    $report->(done => 1);
    return;
}

# If the new archive exists, the model adds it.
sub _note_backup ($self, $guest, $result, $content) {
    my ($store, $name) = ($self->{store}, $result->{name} // return undef);
    if (my $former = $store->{archives}{$name}) {
        return "the name $name is another archive's" if !$former->{'may go'};

        # Another process removed the newest archive, whose name was free again.
        $store->{gone}{$name} = delete($store->{archives}{$name});
    }
    return $result->{done} ? "the new archive $name is not there" : undef
        if !$self->_is_listed($store, $name);
    my ($entry) = grep { $_->{volname} eq $name } $self->_provider->list($guest->vmid)->@*;
    my $spoilt = delete($self->{'spoilt new'}) // {};
    my %parents;
    for my $device (sort keys $content->%*) {
        my $parent = $entry->{devices}{$device}{parent} // next;
        $parents{$device} = "vm/$guest->{vmid}/$parent";
        my $above = ($store->{archives}{ $parents{$device} } // {})->{spoilt} // {};
        $spoilt->{$device} = 1 if $above->{$device};
    }
    $self->{count}{ %parents ? 'increments' : 'full backups' }++;
    $store->{archives}{$name} = {
        content => $content,
        config => "name: $name\n",
        parents => $self->_depends_on(%parents),
        spoilt => $spoilt,
        number => ++$self->{archives},
    };
    return undef;
}

# The archives whose images an archive needs, by device.
sub _depends_on ($self, %parents) { return \%parents }

sub _one_removal ($self, $guest) {
    my ($store, $vmid) = ($self->{store}, $guest->vmid);
    my @names = $self->_names($store, $vmid) or return undef;
    my $name = any(@names);
    my $mishap = $self->_mishap;
    $self->_tell("removal of $name in $store->{path}, " . ($mishap // ''));
    $store->{archives}{$name}{'may go'} = 1;
    my $result
        = $self->_perform_beside($guest, $mishap,
        sub ($report) { $self->_provider->remove($name) });
    my $problem = $self->_note_gone($store);
    $problem //= "$name is still there" if !defined($result->{died}) && $store->{archives}{$name};
    $self->{count}{'removals'}++ if !$store->{archives}{$name};
    return $problem // $self->_must_succeed($guest, $result, 'the removal');
}

my sub random_rules () {
    my %keep = ('keep-last' => 1 + int(rand(4)));
    $keep{$_} = int(rand(3)) for grep { rand() < 0.3 } qw(keep-hourly keep-daily keep-monthly);
    return \%keep;
}

# Only the rules of an archive's devices decide whether it is removed, unless an archive was spoilt and cannot
# be restored.
sub _one_prune ($self, $guest) {
    my ($store, $vmid) = ($self->{store}, $guest->vmid);
    my @names = $self->_names($store, $vmid) or return undef;
    my ($keep, $mishap) = (random_rules(), $self->_mishap);
    $self->_tell("prune of $vmid in $store->{path} by "
            . $json->canonical->encode($keep) . ', '
            . ($mishap // ''));
    my @archives = map {
        {
            name => $_,
            time => _time_of($_),
            devices => { map { $_ => 1 } keys $store->{archives}{$_}{content}->%* }
        }
    } @names;
    my $marks = PVE::BackupAccess::Retention::marks(\@archives, $keep);
    my $is_spoilt = $self->_is_spoilt($store, $vmid);
    my @going = grep { $is_spoilt || ($mishap // '') eq 'flip' || $marks->{$_} eq 'remove' } @names;
    $store->{archives}{$_}{'may go'} = 1 for @going;
    my $result
        = $self->_perform_beside($guest, $mishap,
        sub ($report) { $self->_provider->prune($vmid, $keep) });
    my $problem = $self->_note_gone($store);
    $self->{count}{'prunes'}++ if !defined($result->{died});
    $problem //= 'prune left ' . join(' ', grep { $store->{archives}{$_} } @going)
        if !defined($result->{died})
        && !$is_spoilt
        && ($mishap // '') !~ m/flip|beside/
        && grep { $store->{archives}{$_} } @going;
    return $problem // $self->_must_succeed($guest, $result, 'the prune');
}

sub _time_of ($name) {
    my ($year, $month, @rest) = $name =~ m{/(....)(..)(..)T(..)(..)(..)Z\z};
    my ($day, $hour, $minute, $second) = @rest;
    return Time::Local::timegm_modern($second, $minute, $hour, $day, $month - 1, $year);
}

# Moves archives that may be gone, and are, to the list of removed ones.
sub _note_gone ($self, $store) {
    for my $name (sort keys $store->{archives}->%*) {
        my $may_go = delete($store->{archives}{$name}{'may go'});
        next if $self->_is_listed($store, $name);
        return "$name is gone" if !$may_go;
        $store->{gone}{$name} = delete($store->{archives}{$name});
    }
    return undef;
}

# Flips a bit of any file, and notes what that may spoil.
sub _flip ($self, @) {
    my $store = $self->{store};
    my $flipped = flip_bit($store->{path}) // return undef;
    $self->{count}{'bits flipped'}++;
    $self->_tell("flip in $flipped->{file}");
    my ($place, $file) = $flipped->@{qw(place file)};
    my @devices
        = $file =~ m{/(drive-[a-z0-9]+)\.(?:qcow2|raw|digests)}
        ? $1
        : $self->{guests}{100}->devices;
    my %all = (($store->{gone} // {})->%*, $store->{archives}->%*);

    if (!$all{$place}) {
        $self->{'spoilt new'}{$_} = 1 for @devices, 'other';
    }
    for my $device (@devices) {
        my %is_spoilt = ($place => 1);
        for my $name (sort keys %all) {
            my $parent = $all{$name}{parents}{$device} // '';
            $is_spoilt{$name} = 1 if $is_spoilt{$parent};
            $all{$name}{spoilt}{$device}++ if $is_spoilt{$name};
        }
    }
    return undef;
}

sub _look ($self, $guest) {
    my @names = $self->_names($self->{store}, $guest->vmid) or return undef;
    my $name = any(@names);
    $self->_tell("look at $name");
    return $self->_judge($self->{store}, $name);
}

sub _new_path ($self) { return "$self->{dir}/store-" . (1 + ++$self->{paths}) }

sub _move ($self, $guest) {
    my $path = $self->_new_path;
    rename($self->{store}{path}, $path) or die "rename: $!\n";
    $self->_tell("moved to $path");
    $self->{store}{path} = $path;
    return $self->_look_at_spoilt($self->{store});
}

# Continues in one of the two stores; the other one is used later.
sub _copy ($self, $guest) {
    my $store = $self->{store};
    my ($other) = grep { $_ != $store } $self->{stores}->@*;
    File::Path::remove_tree($other->{path}) if $other;
    my $path = $self->_new_path;
    system('cp', '-a', $store->{path}, $path) == 0 or die "cp: $?\n";
    $self->_tell("copied to $path");
    my $copy = { path => $path };
    for my $kind (qw(archives gone)) {
        my $archives = $store->{$kind} // {};
        $copy->{$kind} = {
            map {
                my $archive = $archives->{$_};
                $_ => { $archive->%*, spoilt => { $archive->{spoilt}->%* } }
            } keys $archives->%*
        };
    }
    $self->{stores} = [$store, $copy];
    $self->{store} = any($self->{stores}->@*);
    return $self->_look_at_spoilt($copy);
}

# Judges one of the archives in which a bit was flipped. The others are as they were when they were judged.
sub _look_at_spoilt ($self, $store) {
    my @names = grep { $store->{archives}{$_}{spoilt}->%* } sort keys $store->{archives}->%*;
    return @names ? $self->_judge($store, any(@names)) : undef;
}

sub _other_store ($self, $guest) {
    $self->{store} = any($self->{stores}->@*);
    $self->_tell("goes on in $self->{store}{path}");
    return undef;
}

sub _remount ($self, $how) {
    system('mount', '-o', "remount,$how", $self->{dir}) == 0 or die "mount: $?\n";
    return;
}

sub _read_only ($self, $guest) {
    return undef if !$self->{is_mounted};
    $self->_tell('read-only');
    $self->_remount('ro');
    my $problem = $self->_look($guest);
    for my $event (\&_one_backup, \&_one_removal, \&_one_prune) {
        my @before = sort keys $self->{store}{archives}->%*;
        local $self->{'only mishap'} = 'read-only';
        $problem //= $event->($self, $guest);
        $problem //= 'archives are otherwise on a read-only store'
            if "@before" ne join(' ', sort keys $self->{store}{archives}->%*);
    }
    $self->_remount('rw');
    return $problem;
}

sub _resize ($self, $guest) {
    my $device = any($guest->devices);
    $self->_tell("resize of $device");
    $guest->resize($device);
    return undef;
}

sub _lose_bitmap ($self, $guest) {
    my $device = any($guest->devices);
    $self->_tell("bitmap of $device lost");
    $guest->lose_bitmap($device);
    return undef;
}

# ---- after each step ----

sub _judge ($self, $store, $name, $seen = {}) {
    my $archive = $store->{archives}{$name};
    $self->{count}{'archives judged'}++;
    return judge(
        $self->_provider($store),
        $store->{path}, $name, $archive, scalar($archive->{spoilt}->%*),
        $self->{scratch}, $seen
    );
}

sub _looks_right ($self, @what) { return looks_right(@what) }

# Every listed archive must be in the model. Archives that look wrong, or were spoilt, are judged if they have
# changed since the last time.
sub _check ($self, $store) {
    my $problem = $self->_note_gone($store);
    return $problem if defined($problem);
    for my $path (glob("$store->{path}/vm/*/2*/manifest.json")) {
        my $name = $path =~ s{/manifest\.json\z}{}r =~ s{\A\Q$store->{path}\E/}{}r;
        return "there is an archive $name, which nobody made" if !$store->{archives}{$name};
    }
    my %seen;
    for my $name (sort keys $store->{archives}->%*) {
        my $archive = $store->{archives}{$name};
        next if $self->_looks_right("$store->{path}/$name", $archive) && !$archive->{spoilt}->%*;
        my $state = $self->_state($store, $name);
        next if $state eq ($archive->{seen} // '');
        $problem = $self->_judge($store, $name, \%seen);
        return $problem if defined($problem);

        # Judging may complete an operation that was interrupted.
        $archive->{seen} = $self->_state($store, $name);
    }
    return undef;
}

# The state of the files that the archive consists of.
sub _state ($self, $store, $name) {
    my %all = (($store->{gone} // {})->%*, $store->{archives}->%*);
    my ($archive, %of) = ($store->{archives}{$name}, $name => 1);
    my @left = ($name);
    while (defined(my $one = shift(@left))) {
        push(@left, grep { !$of{$_}++ } values(($all{$one} // {})->{parents}->%*));
    }
    my @files = map { glob("$store->{path}/$_/*.{qcow2,raw,json,digests,conf}") } sort keys %of;
    my $spoilt = $archive->{spoilt};
    return join("\n",
        map({ "$_ $spoilt->{$_}" } sort keys $spoilt->%*),
        map { substr($_, length($store->{path})) . ' ' . state_of($_) } @files);
}

1;
