# pve-backup-access in the PATH, and a libvirt of the test's own, $uri, with the running domain web1, which has
# the disk vda; $backups and $directory, two empty directories. A Perl block can use $uri. Without libvirt,
# nothing is run; t/libvirt.t says why.

use v5.36;

use File::Temp ();

use PBA::Test::Command qw(put_in_path);
use PBA::Test::DocCode;
use PBA::Test::Libvirt;

sub run_shell ($block, $libvirt) {
    my $dir = File::Temp->newdir('pba-doc.XXXXXX', TMPDIR => 1);
    mkdir("$dir/$_") or die "$dir/$_: $!\n" for qw(bin out);
    put_in_path("$dir/bin");
    PBA::Test::DocCode::run_shell(
        $block,
        PATH => "$dir/bin:$ENV{PATH}",
        uri => $libvirt->uri,
        backups => "$dir/backups",
        directory => "$dir/out",
    );
    return;
}

sub start_libvirt () {
    my $libvirt = PBA::Test::Libvirt->start('system');
    $libvirt->add_disk('vda', bus => 'virtio', size => 8 << 20, format => 'qcow2');
    $libvirt->start_domain;
    return $libvirt;
}

# Destroyed while virsh can still end the domain.
my $libvirt;
END { undef $libvirt }

return sub ($block) {
    return if defined(PBA::Test::Libvirt->problem);
    return run_shell($block, start_libvirt()) if $block->{language} ne 'perl';
    $libvirt //= start_libvirt();
    PBA::Test::DocCode::run_perl($block, '$uri' => $libvirt->uri);
};
