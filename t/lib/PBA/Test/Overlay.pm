package PBA::Test::Overlay;

# An empty overlay above a qcow2 disk of a PBA::Test::VM, in the node "above", and its commit.

use v5.36;

use Exporter qw(import);

use PBA::Test::QemuNbd qw(img);

our @EXPORT_OK = qw(commit_overlay put_overlay);

sub put_overlay ($vm, $id) {
    my ($disk, $file) = ($vm->disk($id), $vm->dir . '/above.qcow2');
    img(qw(create -q -f qcow2 -u -F qcow2 -b), $disk->{file}, $file, $disk->{size});
    $vm->qmp(
        'blockdev-add',
        driver => 'qcow2',
        'node-name' => 'above',
        file => { driver => 'file', filename => $file },
        backing => undef,
    );
    $vm->qmp('blockdev-snapshot', node => $id, overlay => 'above');
    return;
}

sub commit_overlay ($vm) {
    $vm->clear_events;
    $vm->qmp('block-commit', 'job-id' => 'commit', device => 'above');
    $vm->wait_event('BLOCK_JOB_READY');
    $vm->qmp('job-complete', id => 'commit');
    $vm->wait_event('BLOCK_JOB_COMPLETED');
    return;
}

1;
