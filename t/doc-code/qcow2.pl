# A guest as on Proxmox VE. The block defines backup_vm_volume of a provider that stores qcow2 images. The fixture calls it
# for a full and an incremental backup with each mechanism, and compares the images with the disk.

package PBA::Test::DocCode::Qcow2;

use v5.36;

use File::Temp ();

use PBA::Test::DocCode qw(check_same run_perl start_guest);
use PBA::Test::QemuNbd qw(img);

my $mib = 1024 * 1024;

sub content ($file) {
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/ = undef;
    return scalar(<$fh>);
}

# Of PVE::Tools.
sub run_command ($command) {
    system($command->@*) == 0 or die "command '$command->@*' failed\n";
    return;
}

sub file_read_firstline ($file) { return content($file) =~ s/\n.*//sr }

sub check ($backend, $code, $mechanism) {
    state $disk = "\0" x (16 * $mib);
    my $dir = File::Temp->newdir('pba-doc.XXXXXX', TMPDIR => 1);
    my $self = { 100 => {} };
    for my $mode (qw(new reuse)) {
        $backend->guest->write('scsi0', 5 * $mib, 65536, 0x41);
        substr($disk, 5 * $mib, 65536) = 'A' x 65536;
        mkdir("$dir/$mode") or die "$dir/$mode: $!\n";
        $self->{100}->@{qw(archive-subdir backup-dir)} = ($mode, "$dir/$mode");
        my $access = $backend->access('target-id' => "qcow2-$mechanism");
        $access->setup($backend->devices('use'));
        my $volume = $access->volumes($mechanism)->{'drive-scsi0'};
        die "the mode is $volume->{'bitmap-mode'}\n" if $volume->{'bitmap-mode'} ne $mode;
        $code->($self, 100, 'drive-scsi0', $volume, 0);
        undef($volume);
        $access->teardown(1);
        my @files = glob("$dir/$mode/*");
        die "files are left: @files\n" if @files != 1;
        img(qw(convert -f qcow2 -O raw), @files, "$dir/raw");
        die "the image of the backup in mode $mode is not the disk\n"
            if content("$dir/raw") ne $disk;
    }
    return;
}

return sub ($block) {
    state $backend = start_guest();
    my $outside = $backend->outside;
    my $package = run_perl(
        $block,
        run_command => \&run_command,
        file_read_firstline => \&file_read_firstline
    );
    my $code = $package->can('backup_vm_volume') // die "it has no backup_vm_volume\n";
    for my $mechanism ('nbd', -e '/dev/fuse' ? 'file-handle' : ()) {
        check($backend, $code, $mechanism);
        check_same($outside, $backend->outside);
    }
};
