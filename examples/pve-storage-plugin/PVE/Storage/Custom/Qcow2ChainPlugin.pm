package PVE::Storage::Custom::Qcow2ChainPlugin;

# A Proxmox VE storage that keeps backups of virtual machines as chains of qcow2 images, and backups of
# containers as compressed tar files. The backup provider does the work; this plugin has the methods that the
# storage layer calls. Each accepts additional arguments (@), because later versions of the API have added
# arguments and count this as compatible.

use v5.36;

use List::Util qw(min);

use PVE::BackupAccess::Provider::Qcow2Chain;
use PVE::BackupAccess::Try qw(attempt);
use PVE::Storage;

use parent qw(PVE::Storage::Plugin);

my $tested_api = 15;    # of PVE::Storage; backup providers exist since 11

# Bitmaps migrate with their guest, so all nodes must know which backup was the last one.
my $state_dir = '/etc/pve/priv/qcow2chain';

# ---- the storage type ----

sub api { return min($tested_api, PVE::Storage::APIVER()) }
sub type { return 'qcow2chain' }

sub plugindata {
    return {
        content => [{ backup => 1 }, { backup => 1 }],
        features => { 'backup-provider' => 1 },
        'sensitive-properties' => {},
    };
}

sub properties { return {} }

sub options {
    return {
        path => { fixed => 1 },
        (
            map { $_ => { optional => 1 } }
                qw(content disable nodes shared prune-backups max-protected-backups)
        ),
    };
}

sub new_backup_provider ($class, $scfg, $storeid, $log_function, @) {
    return PVE::BackupAccess::Provider::Qcow2Chain->new($class,
        { 'state-dir' => $state_dir, $scfg->%* },
        $storeid, $log_function);
}

# The provider for calls outside of a backup job.
my sub provider ($class, $scfg, $storeid, $log_function = undef) {
    return $class->new_backup_provider($scfg, $storeid, $log_function);
}

# ---- the storage ----

# A missing directory is not created here, because it may be on a file system that is not mounted.
sub activate_storage ($class, $storeid, $scfg, @) {
    die "storage '$storeid': the directory '$scfg->{path}' does not exist\n" if !-d $scfg->{path};
    return 1;
}

sub parse_volname ($class, $volname, @) {
    my ($name, $vmid) = $volname =~ m!\Abackup/((?:vm|ct)/([1-9][0-9]*)/[0-9]{8}T[0-9]{6}Z)\z!
        or die "'$volname' is not a backup of this storage\n";
    return ('backup', $name, $vmid, undef, undef, undef, 'qcow2-chain');
}

sub path ($class, $scfg, $volname, @) {
    my ($type, $name, $vmid) = $class->parse_volname($volname);
    my $path = "$scfg->{path}/$name";
    return wantarray ? ($path, $vmid, $type) : $path;
}

sub filesystem_path ($class, $scfg, $volname, @) {
    return $class->path($scfg, $volname);
}

sub activate_volume { return 1 }
sub deactivate_volume { return 1 }

# ---- archives ----

sub list_images { return [] }

sub list_volumes ($class, $storeid, $scfg, $vmid, $content_types, @) {
    return [] if !grep { $_ eq 'backup' } $content_types->@*;
    my @volumes;
    for my $archive (provider($class, $scfg, $storeid)->list($vmid)->@*) {
        my $volname = "backup/$archive->{volname}";
        my $notes = $class->get_volume_attribute($scfg, $storeid, $volname, 'notes');
        push(
            @volumes,
            {
                volid => "$storeid:$volname",
                content => 'backup',
                format => 'qcow2-chain',
                subtype => $archive->{type},
                vmid => $archive->{vmid},
                ctime => $archive->{time},
                size => $archive->{size} // 0,
                protected => $class->get_volume_attribute($scfg, $storeid, $volname, 'protected'),
                defined($notes) ? (notes => $notes) : (),
            }
        );
    }
    return \@volumes;
}

sub volume_size_info ($class, $scfg, $storeid, $volname, @) {
    my (undef, $name, $vmid) = $class->parse_volname($volname);
    my ($archive)
        = grep { $_->{volname} eq $name } provider($class, $scfg, $storeid)->list($vmid)->@*;
    die "there is no backup '$storeid:$volname'\n" if !$archive;
    my $size = $archive->{size} // 0;
    return wantarray ? ($size, 'qcow2-chain', $size, undef, $archive->{time}) : $size;
}

# What the next archive needs is merged into it. This can take longer than the storage may be locked, so the
# returned function is run by a worker.
sub free_image ($class, $storeid, $scfg, $volname, @) {
    my (undef, $name) = $class->parse_volname($volname);
    die "the backup '$storeid:$volname' is protected\n"
        if $class->get_volume_attribute($scfg, $storeid, $volname, 'protected');
    my $provider = provider($class, $scfg, $storeid);
    return sub { $provider->remove($name) };
}

sub prune_backups ($class, $scfg, $storeid, $keep, $vmid, $type, $dryrun, $log_function = undef, @)
{
    $log_function //= sub ($level, $message) { print "$message\n" };
    my (@entries, %of_guest);
    for my $volume ($class->list_volumes($storeid, $scfg, $vmid, ['backup'])->@*) {
        next if defined($type) && $type ne $volume->{subtype};
        my $entry = { type => $volume->{subtype}, $volume->%{qw(volid vmid ctime)} };
        $entry->{mark} = 'protected' if $volume->{protected};
        push($of_guest{"$volume->{subtype} $volume->{vmid}"}->@*, $entry);
        push(@entries, $entry);
    }
    PVE::Storage::prune_mark_backup_group($_, $keep) for values %of_guest;
    return \@entries if $dryrun;
    my $provider = provider($class, $scfg, $storeid, $log_function);
    my $failed = 0;
    for my $entry (grep { $_->{mark} eq 'remove' } @entries) {
        $log_function->('info', "removing backup '$entry->{volid}'");
        my $error = attempt { $provider->remove($entry->{volid} =~ s!\A.*?:backup/!!r) };
        next if !$error;
        $log_function->('err', "cannot remove backup '$entry->{volid}' - $error");
        $failed++;
    }
    die "cannot remove $failed backups - see the log\n" if $failed;
    return \@entries;
}

# ---- notes and protection: files in the archive's directory ----

my sub attribute_file ($class, $scfg, $volname, $attribute) {
    die "backups of this storage have no attribute '$attribute'\n"
        if $attribute !~ m/\A(?:notes|protected)\z/;
    return $class->path($scfg, $volname) . "/$attribute";
}

sub get_volume_attribute ($class, $scfg, $storeid, $volname, $attribute, @) {
    return undef if $attribute ne 'notes' && $attribute ne 'protected';
    my $file = attribute_file($class, $scfg, $volname, $attribute);
    return -e $file ? 1 : 0 if $attribute eq 'protected';
    open(my $fh, '<:encoding(UTF-8)', $file) or return undef;
    local $/ = undef;
    return scalar(<$fh>);
}

sub update_volume_attribute ($class, $scfg, $storeid, $volname, $attribute, $value, @) {
    my $file = attribute_file($class, $scfg, $volname, $attribute);
    my $is_set = defined($value) && $value ne '' && ($attribute eq 'notes' || $value);
    if (!$is_set) {
        unlink($file) or $!{ENOENT} or die "cannot remove $file - $!\n";
        return;
    }
    open(my $fh, '>:encoding(UTF-8)', $file) or die "cannot write $file - $!\n";
    print {$fh} $value or die "cannot write $file - $!\n";
    close($fh) or die "cannot write $file - $!\n";
    return;
}

# ---- features that the storage does not support ----

sub volume_has_feature { return 0 }

for my $method (
    qw(alloc_image create_base clone_image rename_volume volume_resize volume_snapshot
    volume_snapshot_delete volume_snapshot_rollback)
    )
{
    no strict 'refs';
    *{$method} = sub { die "this storage is for backups only\n" };
}

1;
