package PVE::BackupAccess::CLI::TryProvider::DirPlugin;

# Replaces PVE::Storage::DirPlugin if that cannot be loaded: the methods that a backup provider may call.

use v5.36;

sub type ($class) { return 'dir' }

sub get_subdir ($class, $scfg, $type) {
    die "only backups are kept here\n" if $type ne 'backup';
    return "$scfg->{path}/dump";
}

sub filesystem_path ($class, $scfg, $volname, $snapshot = undef) {
    my ($name) = $volname =~ m!\Abackup/(.+)\z!s or die "only backups are kept here\n";
    my $path = $class->get_subdir($scfg, 'backup') . "/$name";
    return wantarray ? ($path, undef, 'backup') : $path;
}

1;
