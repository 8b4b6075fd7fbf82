# An increment contains only changes: a file that lacks the rest must not look like a complete image.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Fcntl qw(O_CREAT O_RDWR);
use File::Temp ();
use Test::More;

use PBA::Test::CopySource qw(write_file read_file same);
use PBA::Test::NBDServer qw(open_volume pattern);
use PBA::Test::Watchdog;
use PVE::BackupAccess::Volume;

my $KiB = 1 << 10;
my $size = 256 * $KiB;
my @dirty = ([64 * $KiB, 64 * $KiB]);
my $dir = File::Temp->newdir('pba-increment-XXXXXXXX', TMPDIR => 1);
my $unseen = "\xee" x $size;
my $server = PBA::Test::NBDServer->start(size => $size, export => 'disk', dirty => \@dirty);

sub over_nbd ($mode) {
    return open_volume($server, 'bitmap-mode' => $mode);
}

# The mechanism file-handle, as a provider gets it.
sub over_file ($mode) {
    my $file = write_file("$dir/source", pattern(0, $size));
    open(my $handle, '+<:raw', $file) or die "$file: $!\n";
    my @regions = $mode eq 'reuse' ? @dirty : ([0, $size]);
    my %volume = (
        size => $size,
        'bitmap-mode' => $mode,
        'file-handle' => $handle,
        'next-dirty-region' => sub { @regions ? shift(@regions)->@* : () },
    );
    return PVE::BackupAccess::Volume->open('disk', \%volume);
}

my %volumes = (nbd => \&over_nbd, 'file-handle' => \&over_file);

# What exists at the path before, and the expected error.
my %unfit = (
    'a path that is not there' => [undef, qr/there is no \S+, but the volume is an increment/],
    'an empty file' => ['', qr/has 0 bytes instead of $size, but/],
    'a smaller file' => [substr($unseen, 1), qr/has 262143 bytes instead of $size, but/],
    'a larger file' => ["$unseen\0", qr/has 262145 bytes instead of $size, but/],
);

sub prepare ($before) {
    unlink("$dir/target");
    write_file("$dir/target", $before) if defined($before);
    return "$dir/target";
}

sub changed ($before) {
    my $data = $before . "\0" x $size;
    substr($data, $_->[0], $_->[1]) = pattern(@$_) for @dirty;
    return substr($data, 0, $size);
}

for my $mechanism (sort keys %volumes) {
    my $open = $volumes{$mechanism};
    for my $name (sort keys %unfit) {
        my ($before, $pattern) = $unfit{$name}->@*;
        subtest "$mechanism: $name" => sub {
            my $file = prepare($before);
            ok(!eval { $open->('reuse')->copy(to => $file, discard => 0); 1 }, 'is refused');
            like(my $error = $@, qr/\Adevice disk: .*$pattern.*'without-base'\n\z/, 'error');
            is(eval { $error->class }, 'ArgumentError', 'class');
            defined($before)
                ? same(read_file($file), $before, 'the file is unchanged')
                : ok(!-e $file, 'no file was created');

            my @told = (discard => 0, 'without-base' => 1);
            ok(eval { $open->('reuse')->copy(to => $file, @told); 1 }, 'unless told') or diag($@);
            same(read_file($file), changed($before // ''), 'has what changed');
            prepare($before);
            my $new = eval { $open->('new')->copy(to => $file, discard => 0) };
            is($new && -s $file, $size, 'a full copy takes it') or diag($@);
        };
    }
    subtest "$mechanism: handles" => sub {
        for my $before ('', substr($unseen, 1)) {
            sysopen(my $fh, prepare($before), O_RDWR | O_CREAT) or die "target: $!\n";
            ok(!eval { $open->('reuse')->copy(to => $fh, discard => 0); 1 }, 'of an unfit file');
            like($@, qr/descriptor \d+ has \d+ bytes instead of $size, but the volume/, 'error');
        }
        open(my $fh, '+<:raw', prepare($unseen)) or die "target: $!\n";
        ok(eval { $open->('reuse')->copy(to => $fh, discard => 0); 1 }, 'of an image') or diag($@);
        same(read_file("$dir/target"), changed($unseen), 'has what changed');
    };
    subtest "$mechanism: targets that are not files" => sub {
        for my $to ('/dev/null', sub (@) { return }) {
            ok(eval { $open->('reuse')->copy(to => $to, discard => 0); 1 }, "$to") or diag($@);
        }
    };
}

subtest 'a name without a mode is an increment, a volume without either is none' => sub {
    my $file = prepare(undef);
    my $volume = open_volume($server, 'bitmap-mode' => undef);
    ok(!eval { $volume->copy(to => $file); 1 }, 'an increment');
    $volume = open_volume($server, 'bitmap-mode' => undef, 'bitmap-name' => undef);
    ok(eval { $volume->copy(to => $file); 1 }, 'the whole') or diag($@);
};

subtest 'a block device' => sub {
    plan(skip_all => 'needs root and loop devices') if $> != 0 || !-e '/dev/loop-control';
    for my $spare (0, 4096, -4096) {
        my $file = write_file("$dir/backing", "\xee" x ($size + $spare));
        chomp(my $device = `losetup --find --show $file`);
        my $done = eval { over_nbd('reuse')->copy(to => $device, discard => 0); 1 };
        my $error = $@;
        system('losetup', '--detach', $device);
        is($done, $spare < 0 ? undef : 1, "$spare bytes more than the volume") or diag($error);
        like($error, qr/too few for the volume/, 'error') if $spare < 0;
    }
};

done_testing();
