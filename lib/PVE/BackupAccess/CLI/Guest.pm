package PVE::BackupAccess::CLI::Guest;

# Finds the guest that the options name: by its QMP socket, as a libvirt domain, or by its images.
# After reach_guest, the option 'qmp' is valid for PVE::BackupAccess in all three cases.

use v5.36;

use Exporter qw(import);
use File::Basename qw(basename);

use PVE::BackupAccess::CLI qw(absolute usage_error);
use PVE::BackupAccess::CLI::Access qw(show_wait text);
use PVE::BackupAccess::CLI::Monitor qw(log_waits);
use PVE::BackupAccess::Try qw(attempt);
use PVE::BackupAccess::Wait qw(keep_trying);

our @EXPORT_OK = qw(device_named leave_guest reach_guest);

my $no_uuid = '00000000-0000-0000-0000-000000000000';

my sub only_one ($opt) {
    my @given = grep { defined($opt->{$_}) } qw(qmp libvirt image);
    usage_error(join(' and ', map { "--$_" } @given) . ' exclude each other') if @given > 1;
    my %goes_with = (connect => 'libvirt', 'image-format' => 'image', uuid => 'image');
    for my $option (sort keys %goes_with) {
        usage_error("--$option needs --$goes_with{$option}")
            if defined($opt->{$option}) && !defined($opt->{ $goes_with{$option} });
    }
}

# Two image files with the same name in different directories would both become the same disk.
my sub check_names (@disks) {
    my %first;
    for my $disk (@disks) {
        my $other = $first{ $disk->{device} } //= $disk->{file};
        usage_error("the disks $other and $disk->{file} are both called '$disk->{device}'"
                . ' - give one another name, as in --image NAME=FILE')
            if $other ne $disk->{file};
    }
    return @disks;
}

# With --wait, waits until another backup of the guest, which has the images open, has ended.
my sub start_images ($opt, %options) {
    require PVE::BackupAccess::Image;
    my ($images, $error);
    my $try = sub () {
        $error = attempt { $images = PVE::BackupAccess::Image->start(%options) };
        return !$error || $error->class ne 'StateError';
    };
    keep_trying($opt->{wait} // 0, $try);
    die $error if $error;
    return $images;
}

# Opens the images, which represent the guest from now on.
my sub open_images ($opt, %options) {
    my $image = $opt->{images} = start_images($opt, %options);
    $opt->{qmp} = $image->qmp;
    $opt->{persistent} = 1;
    return;
}

my sub format_of ($opt, $file) {
    my $format = $opt->{'image-format'} // ($file =~ m/[.](qcow2|raw)\z/ ? $1 : undef);
    usage_error("$file: the file name does not tell the format - give --image-format qcow2 or raw")
        if !defined($format);
    usage_error("--image-format must be qcow2 or raw, not '$format'")
        if $format !~ m/\A(?:qcow2|raw)\z/;
    return $format;
}

# NAME=FILE, or a FILE whose name up to the dot is the disk's name. A path has a slash before the
# first '='.
my sub image_disk ($opt, $text) {
    my ($name, $file) = $text =~ m{\A([^/=]+)=(.+)\z}s ? ($1, $2) : (undef, $text);
    $name //= basename($file) =~ s/(?<=.)[.][^.]*\z//r;
    return { device => text($name), file => absolute($file), format => format_of($opt, $file) };
}

my sub domain_disks ($domain) {
    my @disks;
    for my $disk (grep { $_->{kind} eq 'disk' && !$_->{'read-only'} } $domain->{disks}->@*) {
        my $what = "domain '$domain->{name}': disk $disk->{target}";
        die "$what is neither a file nor a block device - start the domain to back it up\n"
            if !defined($disk->{file});
        die "$what gets its address when the domain starts - start the domain to back it up\n"
            if !defined($disk->{device});
        die "$what has format '$disk->{format}', but only qcow2 and raw can be backed up while"
            . " the domain is off - start the domain to back it up\n"
            if $disk->{format} !~ m/\A(?:qcow2|raw)\z/;
        push(@disks, { $disk->%{qw(device file format)} });
    }
    die "domain '$domain->{name}' has no disk that can be backed up\n" if !@disks;
    return @disks;
}

my sub reach_domain ($opt, $name) {
    require PVE::BackupAccess::Libvirt;
    my $domain = $opt->{domain} = PVE::BackupAccess::Libvirt->domain($name,
        defined($opt->{connect}) ? (connect => $opt->{connect}) : ());
    $opt->{$_} = [map { device_named($opt, $_) } $opt->{$_}->@*]
        for grep { ref($opt->{$_}) } qw(device exclude);
    return open_images(
        $opt,
        disks => [domain_disks($domain)],
        uuid => $domain->{uuid},
        name => $domain->{name}
    ) if !$domain->{running};
    $opt->{qmp} = $domain->{qmp};
    return if grep { defined } $opt->@{qw(qemu-user qemu-group)};
    $opt->{$_} = $domain->{options}{$_} for keys $domain->{options}->%*;
    return;
}

# Replaces --libvirt and --image by the options that they stand for.
sub reach_guest ($opt) {
    only_one($opt);
    log_waits(\&show_wait) if !$opt->{quiet};
    return reach_domain($opt, $opt->{libvirt}) if defined($opt->{libvirt});
    return if !defined($opt->{image});
    usage_error("--uuid must be a UUID, not '$opt->{uuid}'")
        if ($opt->{uuid} // $no_uuid) !~ m/\A[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\z/i;
    return open_images(
        $opt,
        disks => [check_names(map { image_disk($opt, $_) } $opt->{image}->@*)],
        defined($opt->{uuid}) ? (uuid => lc($opt->{uuid})) : ()
    );
}

# Closes the images, which stores their bitmaps.
sub leave_guest ($opt) {
    $opt->{images}->stop if $opt->{images};
    return;
}

# A disk of a domain may also be named by its target, such as vda.
sub device_named ($opt, $name) {
    my ($disk) = grep { $_->{target} eq $name } ($opt->{domain}{disks} // [])->@*;
    return $disk ? text($disk->{device} // $name) : $name;
}

1;
