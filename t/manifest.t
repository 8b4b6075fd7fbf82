# The contents of a release: MANIFEST names every file of the repository, and all places have the same version.

use v5.36;

use Test::More;

sub lines_of ($file) {
    open(my $fh, '<', $file) or die "$file: $!\n";
    chomp(my @lines = <$fh>);
    return @lines;
}

sub first_match ($file, $pattern) {
    my ($match) = map { m/$pattern/ ? $1 : () } lines_of($file);
    return $match;
}

my $version = first_match('lib/PVE/BackupAccess.pm', qr/^our \$VERSION = '(.*)';/);
is(first_match('CHANGELOG', qr/^(\d\S+)/), $version, 'CHANGELOG begins with this version');
is(first_match('debian/changelog', qr/\((.*?)\)/), $version, 'debian/changelog, too');

my $text = join("\n", lines_of('doc/architecture.md'));
my @unnamed = grep { my $name = s{\A(?:src|glue)/}{}r; $text !~ m/`\Q$name\E`/ }
    grep { !m{^src/vfile/} } glob('src/*/*.c src/*/*/*.c glue/*.c');
is("@unnamed", '', 'doc/architecture.md names every file of the core');

SKIP: {
    skip('not in a git repository', 1) if !-e '.git';
    my @tracked = sort split(m/\0/, qx(git ls-files -z --cached));
    my @named = sort(lines_of('MANIFEST'));
    is_deeply(\@named, \@tracked, 'MANIFEST names what git has')
        or diag(
        './run tidy writes MANIFEST from what git has: add new files to git, run it,' . ' commit');
}

done_testing;
