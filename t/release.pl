# ./run test on another release of Debian, in a chroot: t/release.pl RELEASE [ARGUMENTS of ./run test]

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use PBA::Test::Release;

my ($name, @arguments) = @ARGV;
PBA::Test::Release->new($name // '')->run(@arguments);
