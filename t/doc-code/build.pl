# Builds and installs what "make dist" packs, in a private copy and below a private directory, and runs one
# short test.

use v5.36;

use File::Path qw(make_path);
use File::Basename qw(dirname);
use File::Temp ();

use PBA::Test::DocCode;

return sub ($block) {
    my $copy = File::Temp->newdir('pba-doc.XXXXXX', TMPDIR => 1);
    for my $file (split(m/\n/, qx(git ls-files --cached --others --exclude-standard))) {
        next if !-e $file;
        make_path("$copy/" . dirname($file));
        system('cp', '-p', $file, "$copy/$file") == 0 or die "cannot copy $file\n";
    }
    my $unpack = 'perl Makefile.PL && make dist && tar -xf PVE-BackupAccess-*.tar.gz';
    my $code = "cd '$copy'\nexec >/dev/null\n$unpack\ncd PVE-BackupAccess-*/\n$block->{code}";
    PBA::Test::DocCode::run_shell(
        { $block->%*, code => $code },
        DESTDIR => "$copy/installed",
        TEST_FILES => 't/args.t',
        MAKEFLAGS => '-e',
        PBA_OPTIMIZE => '-O0',
    );
    my ($module) = qx(find '$copy/installed' -name BackupAccess.pm);
    die "nothing was installed\n" if !$module;
};
