# A volume of the mechanism file-handle from its reader's point of view, with an ordinary file and a code ref:
# the handle may be of any kind, and the code ref may return anything.

use v5.36;

use File::Temp ();
use List::Util qw(pairs);
use POSIX ();
use Test::More;

use PVE::BackupAccess::Volume;

my $Volume = 'PVE::BackupAccess::Volume';

my $KiB = 1 << 10;
my $size = 256 * $KiB;
my $dir = File::Temp->newdir('pba-handle-XXXXXXXX', TMPDIR => 1);
my $content = join('', map { chr(65 + $_ % 26) x $KiB } 1 .. 256);

sub write_file () {
    open(my $fh, '>:raw', "$dir/disk") or die "cannot write: $!\n";
    print {$fh} $content;
    close($fh) or die "cannot write: $!\n";
    return;
}

# A volume over that file, whose code ref returns these lists one after the other.
sub open_volume ($mode, $path = "$dir/disk", @answers) {
    open(my $fh, $mode, $path) or die "cannot open $path: $!\n";
    my $next = sub {
        my $answer = shift(@answers) // [];
        return ref($answer) eq 'CODE' ? $answer->() : $answer->@*;
    };
    my %volume = ('file-handle' => $fh, 'next-dirty-region' => $next);
    return $Volume->open('drive-scsi0', { %volume, size => $size, 'bitmap-mode' => 'reuse' });
}

sub fails ($code, $class, $message, $name) {
    ok(!eval { $code->(); 1 }, "$name: fails");
    my $error = $@;
    is(ref($error) && $error->class, $class, "$name: class");
    like($error, $message, "$name: message");
    return;
}

write_file();

subtest 'regions' => sub {
    my @regions = ([0, 4 * $KiB], [4 * $KiB, 64 * $KiB], [$size - 512, 512]);
    my $calls = 0;
    my $volume = open_volume('+<', "$dir/disk", @regions, sub { $calls++; return });
    is_deeply([$volume->next_dirty_region], $_, "at $_->[0]") for @regions;
    is_deeply([$volume->next_dirty_region], [], 'the end') for 1, 2;
    is($calls, 1, 'the end is requested only once');
    my $undef = open_volume('+<', "$dir/disk", sub { return undef });
    is_deeply([$undef->next_dirty_region], [], 'undef ends the map, as in the API');
};

# The values that a call returned must not change when the next call returns.
subtest 'regions kept' => sub {
    my @regions = map { [$_ * 64 * $KiB, $KiB] } 0 .. 3;
    my $volume = open_volume('<', "$dir/disk", @regions);
    my @two = ($volume->next_dirty_region, $volume->next_dirty_region);
    is_deeply(\@two, [map { $_->@* } @regions[0, 1]], 'two calls in a list');
    $volume = open_volume('<', "$dir/disk", @regions);
    my @kept = map { [\($volume->next_dirty_region)] } @regions;
    is_deeply(
        [
            map {
                [map { $$_ } $_->@*]
            } @kept
        ],
        \@regions,
        'references to what came'
    );
    $volume = open_volume('<', "$dir/disk", @regions);
    my @aliases;
    push(
        @aliases,
        sub { \@_ }
            ->($volume->next_dirty_region)
    ) for @regions;
    is_deeply(\@aliases, \@regions, 'arguments');
};

# An invalid region must never be mistaken for the end, neither now nor later.
subtest 'invalid regions' => sub {
    my @odd = (
        [undef, 4096] => qr/returned something that is not a region/,
        [0, undef] => qr/returned something that is not a region/,
        ['0 bytes', 4096] => qr/returned something that is not a region/,
        [0, 0] => qr/returned something that is not a region/,
        [0] => qr/returned something that is not a region/,
        [0, 4096, 8192] => qr/returned something that is not a region/,
        [0, $size + 1] => qr/cannot begin at offset 0 with length 262145/,
        [$size, 1] => qr/cannot begin at offset 262144 with length 1/,
        [~0, 4096] => qr/cannot begin at offset 18446744073709551615 with length 4096/,
        [-4096, 4096] => qr/returned something that is not a region/,
        [512.5, 4096] => qr/returned something that is not a region/,
        [512, 4096.25] => qr/returned something that is not a region/,
        ['nan', 4096] => qr/returned something that is not a region/,
        [4096, ~0] => qr/cannot begin at offset 4096 with length 18446744073709551615/,
    );
    for my $case (pairs(@odd)) {
        my ($answer, $message) = $case->@*;
        my $name = '(' . join(', ', map { $_ // 'undef' } $answer->@*) . ')';
        my $volume = open_volume('<', "$dir/disk", $answer);
        fails(sub { $volume->next_dirty_region }, 'IncompleteError', $message, $name);
        fails(sub { $volume->next_dirty_region }, 'NbdError', $message, "$name, again");
    }
    my $volume = open_volume('<', "$dir/disk", [8192, 4096], [4096, 4096]);
    $volume->next_dirty_region;
    fails(
        sub { $volume->next_dirty_region },
        'IncompleteError',
        qr/drive-scsi0: .*offset 4096/,
        'an invalid region before the last one'
    );
};

subtest 'a code ref that dies' => sub {
    my $exception = { an => 'exception' };
    my $volume = open_volume('<', "$dir/disk", sub { die $exception });
    ok(!eval { $volume->next_dirty_region; 1 }, 'fails');
    is($@, $exception, 'the exception arrives unchanged');
    fails(
        sub { $volume->next_dirty_region },
        'NbdError',
        qr/next-dirty-region died/,
        'a later call dies, too'
    );
};

subtest 'reading' => sub {
    my $volume = open_volume('<');
    is($volume->pread(65_000, 4096), substr($content, 65_000, 4096), 'any range');
    truncate("$dir/disk", 128 * $KiB) or die "truncate: $!\n";
    is(
        $volume->pread(64 * $KiB, 64 * $KiB),
        substr($content, 64 * $KiB, 64 * $KiB),
        'a read up to the end of the disk'
    );
    fails(
        sub { $volume->pread(64 * $KiB, 65 * $KiB) },
        'IncompleteError',
        qr/drive-scsi0: the file ends at offset 131072 instead of 262144/,
        'beyond the end of the file'
    );
    write_file();
    is($volume->pread(0, $size), $content, 'an error does not affect the next read');

    my $unreadable = open_volume('>>');
    fails(
        sub { $unreadable->pread(4096, 512) },
        'SystemError',
        qr/reading \d+ bytes at offset 4096 failed - Bad file descriptor/,
        'a handle that is not open for reading'
    );

    # For unmapped addresses, this file returns the same error as the virtual file for clean parts.
    my $eio = open_volume('<', '/proc/self/mem');
    fails(
        sub { $eio->pread(0, 4096) },
        'SystemError',
        qr/offset 0 failed - Input\/output error.*not wholly dirty or was discarded/,
        'a range that cannot be read'
    );
};

# A code ref returns each region once. After the caller has seen some regions, a copy must not omit them.
subtest 'copies' => sub {
    my @regions = ([512, 512], [4 * $KiB, 64 * $KiB], [128 * $KiB, 64 * $KiB], [$size - 512, 512]);
    my $expected = "\0" x $size;
    substr($expected, $_->[0], $_->[1]) = substr($content, $_->[0], $_->[1]) for @regions;
    my $copy = sub ($volume, $name, @options) {
        my $target = "$dir/target";
        unlink($target);
        $volume->copy(to => $target, discard => 0, 'without-base' => 1, @options);
        open(my $fh, '<:raw', $target) or die "open: $!\n";
        local $/ = undef;
        ok(scalar(<$fh>) eq $expected, $name);
    };
    my $die = sub (@) { die "enough\n" };
    my %before = (
        'nothing' => sub ($volume) { },
        'two regions' => sub ($volume) { $volume->dirty_regions(2) },
        'all regions' => sub ($volume) { $volume->dirty_regions(10) },
        'a copy that failed' => sub ($volume) {
            eval { $volume->copy(to => $die) }
        },
        'one that counted' => sub ($volume) {
            eval {
                $volume->copy(to => $die, progress => sub (@) { });
            };
        },
    );
    for my $name (sort keys %before) {
        my $volume = open_volume('+<', "$dir/disk", @regions);
        $before{$name}->($volume);
        $copy->($volume, "after $name");
        $copy->($volume, "after $name, again, counted", progress => sub (@) { });
        my $left = $name eq 'all regions' ? 0 : $name eq 'two regions' ? 2 : 4;
        my @left = @regions[4 - $left .. 3];
        is_deeply(
            [$volume->dirty_regions(10)],
            [map { $_->@* } @left],
            "after $name: next_dirty_region is where it was"
        );
    }
};

subtest 'discarding' => sub {
    my $volume = open_volume('+<');
    $volume->discard(64 * $KiB, 64 * $KiB);
    is($volume->pread(64 * $KiB, 64 * $KiB), "\0" x (64 * $KiB), 'is gone');
    is($volume->pread(0, 64 * $KiB), substr($content, 0, 64 * $KiB), 'the data before it stays');
    is(-s "$dir/disk", $size, 'the size stays');
    write_file();
    my $read_only = open_volume('<');
    fails(
        sub { $read_only->discard(0, $size) },
        'SystemError',
        qr/drive-scsi0: discarding $size bytes at offset 0 failed - Bad file descriptor/,
        'a handle that is not open for writing'
    );
};

subtest 'the handle' => sub {
    open(my $fh, '<', "$dir/disk") or die "open: $!\n";
    my %volume = ('file-handle' => $fh, size => $size, 'bitmap-mode' => 'none');
    my %regions = ('next-dirty-region' => sub { return });
    my $volume = $Volume->open('drive-scsi0', { %volume, %regions });
    POSIX::close(fileno($fh)) or die "close: $!\n";
    is($volume->pread(0, 512), substr($content, 0, 512), 'is needed to open the volume only');
    fails(
        sub { $Volume->open('drive-scsi0', { %volume, %regions }) },
        'SystemError',
        qr/drive-scsi0: cannot use the file handle - Bad file descriptor/,
        'a closed file handle is refused'
    );
    my @sizes = (
        ["$dir/disk", $size - 512, qr/the file has 262144 bytes instead of 261632/],
        ["$dir/disk", $size + 512, qr/the file has 262144 bytes instead of 262656/],
        ['/dev/zero', 1 << 63, qr/a file cannot have 9223372036854775808 bytes/],
    );

    for my $case (@sizes) {
        my ($path, $other, $message) = $case->@*;
        open(my $again, '<', $path) or die "open: $!\n";
        my %other = (%volume, %regions, 'file-handle' => $again, size => $other);
        fails(
            sub { $Volume->open('drive-scsi0', \%other) },
            'ArgumentError', qr/drive-scsi0: $message/,
            "$other bytes"
        );
    }
    $volume->close;
    fails(
        sub { $volume->pread(0, 512) },
        'StateError',
        qr/the volume was closed already/,
        'a closed volume'
    );
};

done_testing();
