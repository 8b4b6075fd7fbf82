package PBA::Test::Provider;

# A backup provider that records its calls. on => { method => code } replaces what a method does; the code gets
# the provider and the arguments.

use v5.36;

use PVE::BackupAccess::PluginBase;
use parent 'PVE::BackupProvider::Plugin::Base';

use PVE::BackupAccess::Volume;

# mechanism => nbd or file-handle, mode => for all devices (undef: no answer), on => { ... }.
sub new ($class, %opt) {
    return bless({ mechanism => 'nbd', mode => 'use', %opt, calls => [] }, $class);
}

# The default action of each method.
my %usual = (
    provider_name => sub ($self) { 'test' },
    job_init => sub ($self, $start_time) { },
    job_cleanup => sub ($self) { },
    backup_init => sub ($self, $vmid, @) { return { 'archive-name' => "vm/$vmid/1" } },
    backup_get_mechanism => sub ($self, @) { $self->{mechanism} },
    backup_vm_query_incremental => sub ($self, $vmid, $volumes) {
        my $mode = $self->{mode} // return;
        return { map { $_ => $mode } keys $volumes->%* };
    },
    backup_vm => sub ($self, $vmid, $config, $volumes, $info) { $self->store($volumes) },
    backup_cleanup => sub ($self, @) { return { stats => { 'archive-size' => 4711 } } },
    backup_handle_log_file => sub ($self, @) { },
);

for my $method (keys %usual) {
    no strict 'refs';
    *{$method} = sub ($self, @arguments) {
        push($self->{calls}->@*, [$method, @arguments]);
        my $code = $self->{on}{$method} // $usual{$method};
        return $code->($self, @arguments);
    };
}

# Reads everything that is dirty. $self->{regions} is then { device => [offsets and lengths] }.
sub store ($self, $volumes) {
    for my $device (sort keys $volumes->%*) {
        my $volume = PVE::BackupAccess::Volume->open($device, $volumes->{$device});
        my @regions;
        while (my @region = $volume->next_dirty_region) {
            push(@regions, @region);
            read_region($volume, @region);
        }
        $self->{regions}{$device} = \@regions;
        $volume->close;
    }
    return;
}

# The blocks of a device that were dirty in the last backup: { offset of a block of 64 KiB => 1 }.
sub blocks ($self, $device) {
    my @regions = $self->{regions}{$device}->@*;
    my %blocks;
    while (my ($offset, $length) = splice(@regions, 0, 2)) {
        $blocks{ $offset + $_ * 65536 } = 1 for 0 .. $length / 65536 - 1;
    }
    return \%blocks;
}

sub read_region ($volume, $offset, $length) {
    my $piece = 1 << 20;
    for (my $at = $offset; $at < $offset + $length; $at += $piece) {
        my $left = $offset + $length - $at;
        my $size = $left < $piece ? $left : $piece;
        $volume->pread($at, $size);
        $volume->discard($at, $size);
    }
    return;
}

# Records another event between the calls.
sub note ($self, $name) {
    push($self->{calls}->@*, [$name]);
    return;
}

# Returns the names of the methods called so far, and clears the list.
sub take_names ($self) {
    return map { $_->[0] } $self->take_calls;
}

sub take_calls ($self) {
    return splice($self->{calls}->@*);
}

1;
