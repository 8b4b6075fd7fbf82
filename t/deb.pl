# Builds the Debian package for ./run deb, and stores it in the given directory.
#
#     perl t/deb.pl [--test] DIRECTORY
#
# Builds the files that git knows, including uncommitted changes, or those of a release, in a copy, because
# dpkg-buildpackage writes to the parent directory. --test checks the result with lintian; with PBA_FULL=1, the
# package is built twice in different directories, and the results must be equal.

use v5.36;

use Digest::SHA ();
use File::Copy qw(copy);
use File::Temp ();
use FindBin;
use lib "$FindBin::Bin/lib";

use PBA::Test::Sources qw(source_files);

sub run (@command) {
    system(@command) == 0 or die "'@command' failed\n";
    return;
}

# Prints the output of a command only if it fails.
sub run_quietly ($log, @command) {
    my $status = system('sh', '-c', 'log=$1; shift; exec "$@" >"$log" 2>&1', 'sh', $log, @command);
    return if $status == 0;
    run('cat', $log);
    die "'@command' failed\n";
}

# The files that git knows, committed or not; in a release, which has no git, those in MANIFEST.
sub sources () {
    return source_files() if -e '.git';
    open(my $manifest, '<', 'MANIFEST') or die "MANIFEST: $!\n";
    return map { m/\A(\S+)/ } <$manifest>;
}

sub copy_sources ($to) {
    my @files = sources() or die "there are no sources here\n";
    my $command = 'tar -cf - --null -T - | tar -xf - -C "$1"';
    open(my $tar, '|-', 'sh', '-c', $command, 'sh', $to) or die "tar: $!\n";
    print {$tar} map { "$_\0" } @files;
    close($tar) or die "the sources could not be copied\n";
    return;
}

# The directory with the packages. The sources are below it.
sub build ($name) {
    my $dir = File::Temp->newdir("pba-deb-$name.XXXXXX", TMPDIR => 1);
    my $copy = "$dir/libpve-backup-access-perl";
    mkdir($copy) or die "$copy: $!\n";
    copy_sources($copy);
    run_quietly("$dir/log", 'sh', '-c', 'cd "$1" && dpkg-buildpackage -us -uc -b', 'sh', $copy);
    return $dir;
}

sub packages ($dir) {
    my @files = glob("$dir/*.deb");
    die "no package was built\n" if !@files;
    return @files;
}

sub digest ($file) { return Digest::SHA->new(256)->addfile($file)->hexdigest }

# The packages that differ in a second build in another directory.
sub differing ($dir) {
    my $again = build('the-second-of-two');
    my %first = map { s{.*/}{}r => digest($_) } packages($dir);
    return grep { ($first{s{.*/}{}r} // '') ne digest($_) } packages($again);
}

my $test = @ARGV && $ARGV[0] eq '--test' ? shift(@ARGV) : '';
my $to = shift(@ARGV);
my $dir = build('first');
if ($test) {
    say $ENV{PBA_FULL} ? '1..3' : '1..2';
    say 'ok 1 - the Debian package is built';
    my ($changes) = glob("$dir/*.changes");
    my $status = system('lintian', '--allow-root', '--fail-on', 'error,warning', $changes) >> 8;
    say $status ? 'not ok' : 'ok', ' 2 - lintian finds no fault';
    my @differ = $ENV{PBA_FULL} ? differing($dir) : ();
    say @differ ? 'not ok' : 'ok', ' 3 - two builds are the same' if $ENV{PBA_FULL};
    exit(@differ || $status ? 1 : 0);
}
mkdir($to);
for my $file (packages($dir), glob("$dir/*.changes"), glob("$dir/*.buildinfo")) {
    copy($file, $to) or die "$to: $!\n";
    say "$to/", $file =~ s{.*/}{}r if $file =~ m/\.deb\z/;
}
