package Example::AnyLanguage;

# A backup provider whose data path is another program: examples/any-language/store.py, or a built store.go.
# The storage's option 'program' names it. An archive is a directory with an index of each device. The blocks
# are stored beside the archives. This example never removes blocks.

use v5.36;
use parent 'Example::RawImages';

use File::Temp ();
use JSON::PP ();

my $json = JSON::PP->new->utf8->canonical;

sub new ($class, $storage_plugin, $scfg, $storeid, $log) {
    my $self = $class->SUPER::new($storage_plugin, $scfg, $storeid, $log);
    $self->{program} = $scfg->{program} // die "the storage has no 'program'\n";
    $self->{command} = [split(' ', $scfg->{command} // 'pve-backup-access')];
    return $self;
}

sub provider_name ($self) { return 'blocks by their digests' }

sub run_program ($self, @arguments) {
    system($self->{program}, @arguments) == 0 or die "$self->{program} $arguments[0] failed\n";
}

# The size of the disk that the index describes, 0 if there is no index.
sub index_size ($file) {
    open(my $fh, '<:raw', $file) or return 0;
    my $is_there = read($fh, my $bytes, 8) == 8;
    return $is_there && unpack('Q>', $bytes) =~ m/\A([0-9]+)\z/ ? $1 : 0;  # untainted for a restore
}

# ---- backup ----

sub backup_vm_query_incremental ($self, $vmid, $volumes) {
    $self->SUPER::backup_vm_query_incremental($vmid, $volumes);            # sets $self->{base}
    my $id = Example::RawImages::read_file("$self->{base}/id") // '';
    my %answer;
    for my $device (keys $volumes->%*) {
        my $volume = $volumes->{$device};
        my $is_base = index_size("$self->{base}/$device.index") == $volume->{size};
        my $mode = exists($volume->{base}) ? { 'bitmap-mode' => 'use', base => $id } : 'use';
        $answer{$device} = $is_base ? $mode : 'new';
    }
    return \%answer;
}

# The program gets the volume as JSON, and runs pve-backup-access to read the data.
sub store ($self, $device, $volume, $image, $info) {
    $self->run_program(
        'backup', $self->{dir}, $image =~ s/[.]raw\z/.index/r,
        "$self->{base}/$device.index", $device,
        $json->encode($volume),
        $info->{'bandwidth-limit'} // '',
        $self->{command}->@*
    );
}

# ---- restore ----

sub restore_vm_init ($self, $volname, @) {
    my $archive = $self->archive($volname);
    return { map { m!([^/]+)\.index\z! ? ($1 => { size => index_size($_) }) : () }
            glob("\Q$archive\E/*.index") };
}

sub restore_vm_volume_init ($self, $volname, $device, $info) {
    my $image = $self->{images}{$device} = File::Temp->new(DIR => $self->{dir});
    $self->run_program('restore', $self->{dir}, $self->archive($volname) . "/$device.index",
        "$image");
    return { 'qemu-img-path' => "$image" };
}

sub restore_vm_volume_cleanup ($self, $volname, $device, $info) { delete($self->{images}{$device}) }

1;
