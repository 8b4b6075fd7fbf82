# Invalid arguments are refused with an ArgumentError that names them, before anything is sent or created.

use v5.36;
use utf8;

use lib 't/lib';

use File::Temp ();
use Test::More;

use PBA::Test::NBDServer;
use PVE::BackupAccess;
use PVE::BackupAccess::Volume;

my $Error = 'PVE::BackupAccess::Error';
my $Volume = 'PVE::BackupAccess::Volume';

binmode($_, ':encoding(UTF-8)')
    for Test::More->builder->output, Test::More->builder->failure_output;

my $dir = File::Temp->newdir('pba-args-XXXXXXXX', TMPDIR => 1);
my $calls = 0;
my %good = (
    qmp => sub (@) { $calls++; die "must not be asked\n" },
    'target-id' => 'snapshot-access:mystore',
    'run-dir' => "$dir/run",
);
my $no_character = chr(0xD800);    # a lone surrogate: valid in Perl, but not in UTF-8
my $beyond_unicode = chr(0x110000);

sub shown ($value) {
    return 'undef' if !defined($value);
    return ref($value) . ' ref' if ref($value);
    my $text = length($value) > 30 ? length($value) . ' characters' : "'$value'";
    return $text =~ s/([^\x20-\x7e])/sprintf('\\x{%x}', ord($1))/ger;
}

sub is_argument_error ($error, $pattern, $name) {
    my $class = ref($error) && $error->isa($Error) ? $error->class : 'none';
    my $ok = is($class, 'ArgumentError', "$name: refused");
    $ok &= like("$error", $pattern, "$name: the message names it") if $ok;
    $ok &= unlike("$error", qr/[[:cntrl:]](?!\z)/, "$name: one line") if $ok;
    diag(shown("$error")) if !$ok;
    return;
}

# The code must die with such an error, and nothing must have happened.
sub refused ($code, $pattern, $name) {
    $calls = 0;
    my $done = eval { $code->(); 1 };
    my $error = $@;
    return fail("$name: refused") if $done;
    is_argument_error($error, $pattern, $name);
    is($calls, 0, "$name: nothing was sent");
    is_deeply([glob("$dir/*")], [], "$name: nothing was made");
    return;
}

sub new_access (%options) { return PVE::BackupAccess->new(%good, %options) }

subtest 'new: options' => sub {
    refused(sub { PVE::BackupAccess->new(%good, 'timeout') }, qr/pairs/, 'odd number');
    refused(sub { PVE::BackupAccess->new('qmp') }, qr/pairs/, 'a lone name');
    for my $name ('target_id', 'Qmp', '', "a\nb", 'ünknown') {
        refused(sub { new_access($name => 1) }, qr/unknown option/, 'option ' . shown($name));
    }
    for my $name (qw(qmp target-id)) {
        my %options = %good;
        delete $options{$name};
        refused(sub { PVE::BackupAccess->new(%options) }, qr/\b\Q$name\E\b/, "without $name");
    }
};

# Proxmox' commands give a target's bitmap the name of the target, which must not be the name of another bitmap.
my @others_bitmaps = (
    'pba-tied:snapshot-access:other',
    'pba-id:x',
    'pba-audit:x',
    'pba-background:other',
    map({ "pba-background${_}0123456789abcdef:other" } '-', '+'),
    'backup-access-background-bitmap',
    'pbs-incremental-dirty-bitmap',
);

my %bad_option = (
    qmp => [undef, '', [], {}, \'path', "a\0b"],
    'target-id' => [
        undef, '', [], {}, 'Proxmox', 'Proxmox VE', 'x' x 1024, 'ü' x 512, "a${no_character}b",
        $beyond_unicode, "my\0store", "Proxmox\0", "\0", @others_bitmaps,
    ],
    'run-dir' => [undef, '', [], 'run', './run', '../run', "$dir$no_character", "$dir/a\0b"],
    'fleecing-dir' => [undef, '', {}, 'fleecing', '.', "/$no_character", "$dir/a\0b"],
    'bitmap-name' => [undef, '', [], $no_character, "a\0b", @others_bitmaps],
    fleecing => [
        undef,
        '',
        'node',
        [],
        { 'drive-scsi0' => undef },
        { 'drive-scsi0' => '' },
        { 'drive-scsi0' => [] },
        { '' => 'node' },
        { 'drive-scsi0' => $no_character },
        { 'drive-scsi0' => "a\0b" },
        { "a\0b" => 'node' },
    ],
    timeout =>
        [undef, '', 0, '00', -1, 1.5, '1e3', 'abc', ' 5', "5\n", '0x5', '٣', '9' x 10, [], {}],
    log => [undef, '', 'main::log', [], {}, \'text'],
    persistent => [[], {}, 2, 'no', -1],
    'allow-shared' => [[], {}, 2, 'no', -1],
);

for my $name (sort keys %bad_option) {
    subtest "new: $name" => sub {
        for my $value ($bad_option{$name}->@*) {
            my $what = ref($value) eq 'HASH'
                && %$value ? '{' . join(' => ', map { shown($_) } %$value) . '}' : shown($value);
            refused(sub { new_access($name => $value) }, qr/\Q$name\E/, "$name $what");
        }
    };
}

subtest 'new: what is allowed' => sub {
    my @good = (
        { 'target-id' => 'x' x 991 },
        { 'target-id' => 'Proxmox Backup' },
        { 'target-id' => 'proxmox' },
        { 'target-id' => 'schlüssel/%s%n: "x"' },
        { timeout => 1 },
        { timeout => 999999999 },
        { persistent => 0 },
        { persistent => 1 },
        { 'allow-shared' => 1 },
        { fleecing => {} },
        { fleecing => { 'drive-scsi0' => 'node' } },
        { log => sub { } },
        { qmp => '/nonexistent/qmp.sock' },
    );
    for my $options (@good) {
        my ($name) = keys %$options;
        my $access = eval { new_access(%$options) };
        isa_ok($access, 'PVE::BackupAccess', "$name " . shown($options->{$name})) or diag($@);
    }
    is($calls, 0, 'nothing was sent');
    is_deeply([glob("$dir/*")], [], 'nothing was made');
};

subtest capabilities => sub {
    refused(sub { PVE::BackupAccess->capabilities('qmp') }, qr/pairs/, 'odd number');
    refused(sub { PVE::BackupAccess->capabilities() }, qr/\bqmp\b/, 'without qmp');
    refused(
        sub { PVE::BackupAccess->capabilities(qmp => $good{qmp}, 'run-dir' => '/run') },
        qr/unknown option 'run-dir'/,
        'an option of new'
    );
    for my $value ($bad_option{qmp}->@*) {
        refused(sub { PVE::BackupAccess->capabilities(qmp => $value) }, qr/\bqmp\b/, shown($value));
    }
    for my $value ($bad_option{timeout}->@*) {
        my $ask = sub { PVE::BackupAccess->capabilities(qmp => $good{qmp}, timeout => $value) };
        refused($ask, qr/\btimeout\b/, 'timeout ' . shown($value));
    }
};

my %bad_devices = (
    'no array' => [undef, '', 'drive-scsi0', {}, sub { }, { device => 'drive-scsi0' }],
    'no devices' => [[]],
    'device no hash' => [[undef], ['drive-scsi0'], [[]], [sub { }], [{ device => 'a' }, 'b']],
    'device lacks its name' => [[{}], [{ 'bitmap-mode' => 'new' }]],
    "device's name" =>
        [map { [{ device => $_ }] } undef, '', [], {}, $no_character, $beyond_unicode, "a\0b"],
    'unknown key' =>
        [map { [{ device => 'a', $_ => 'new' }] } 'mode', 'bitmap_mode', 'fleecing', '', "a\nb"],
    'bitmap-mode' => [
        map { [{ device => 'a', 'bitmap-mode' => $_ }] } undef,
        '', 'used', 'reuse', 'New', 'new ', 'incremental', 0, [], {}, "use\0x", '%n%s', "none\nx"
    ],
    'listed twice' => [
        [map { { device => $_ } } 'a', 'b', 'a'],
        [{ device => 'a', 'bitmap-mode' => 'new' }, { device => 'a', 'bitmap-mode' => 'use' }],
        [map { { device => $_ } } "a\nb", "a\nb"],
    ],
);
my %message = (
    'no array' => qr/array/,
    'no devices' => qr/at least one device/,
    'device no hash' => qr/device.*hash/,
    'device lacks its name' => qr/'device'/,
    "device's name" => qr/device/,
    'unknown key' => qr/unknown key/,
    'bitmap-mode' => qr/bitmap[ -]mode/,
    'listed twice' => qr/device a.*twice/s,
);

for my $kind (sort keys %bad_devices) {
    subtest "setup: $kind" => sub {
        for my $devices ($bad_devices{$kind}->@*) {
            my $access = new_access();
            my $first = ref($devices) eq 'ARRAY' ? $devices->[0] : undef;
            my $what
                = ref($first) eq 'HASH' ? join(', ', map { shown($_) } %$first) : shown($first);
            refused(sub { $access->setup($devices) }, $message{$kind}, $what);
            ok(!eval { $access->teardown(0) }, 'no access is up');
            is($@ && $@->class, 'StateError', 'teardown has the class StateError');
        }
    };
}

subtest 'methods out of turn' => sub {
    my $access = new_access();
    my %early = (
        teardown => sub { $access->teardown(1) },
        volumes => sub { $access->volumes('nbd') },
        volume => sub { $access->volume('drive-scsi0') },
    );
    for my $name (sort keys %early) {
        $calls = 0;
        ok(!eval { $early{$name}->(); 1 }, "$name before setup");
        is(ref($@) && $@->class, 'StateError', "$name: class");
        is($calls, 0, "$name: nothing was sent");
    }
};

subtest 'volumes and volume' => sub {
    my $access = new_access();
    for my $mechanism (undef, '', 'NBD', 'nbd ', 'iscsi', "nbd\0", [], {}) {
        refused(sub { $access->volumes($mechanism) }, qr/mechanism/, shown($mechanism));
    }
    for my $device (undef, [], {}) {
        refused(sub { $access->volume($device) }, qr/device/, shown($device));
    }
};

subtest 'errors of Perl code' => sub {
    my $path = "/Gr\xc3\xb6\xc3\x9fe";    # in UTF-8: \x9f alone would be a control character
    eval { $Error->throw('SystemError', "no $path\n\e[31m\0", device => 'disk0') };
    is("$@", "no $path  [31m \n", 'the message is one line and keeps the path');
    is($@->device, 'disk0', 'the error names the device');
};

# If the core returned a string with the UTF-8 flag, Perl would upgrade the bytes it is joined to, and use
# another file name.
subtest 'names from the core, joined to file names' => sub {
    my $tmp = File::Temp->newdir;
    mkdir(my $dir = "$tmp/Gr\xc3\xb6\xc3\x9fe") or die "mkdir: $!\n";
    mkdir("$dir/disk0") or die "mkdir: $!\n";
    eval { $Volume->open('disk0', { 'nbd-path' => "$tmp/none" }) };
    my $device = $@->device;
    is($device, 'disk0', 'the device of an error');
    ok(-d "$dir/$device", 'the joined name is that of the directory');
};

subtest bitmap_status => sub {
    for my $action ('', 'use', 'reuse', 'none', 'Used', 'used ', "used\0", "new\n", 1, [], '%s%n') {
        my $done = eval { PVE::BackupAccess::bitmap_status($action); 1 };
        ok(!$done, shown($action) . ': refused');
        isa_ok($@, $Error, shown($action));
        unlike("$@", qr/[[:cntrl:]](?!\z)/, 'the error is one line');
    }
};

subtest 'wrong invocants' => sub {
    my $access = new_access();
    my %call = (
        'a string' => sub { $Volume->can('size')->('x') },
        'undef' => sub { $Volume->can('size')->(undef) },
        'a hash' => sub { $Volume->can('size')->({}) },
        'a number' => sub { $Volume->can('next_dirty_region')->(4711) },
        'a reference to a number' => sub { $Volume->can('close')->(\4711) },
        'the class' => sub { $Volume->size },
        'an access' => sub { $Volume->can('size')->($access) },
        'a subclass of hashes' => sub {
            no warnings 'once';
            @My::Volume::ISA = ($Volume);
            local *My::Volume::DESTROY = sub { };
            my $object = bless({}, 'My::Volume');
            $object->size;
        },
        'setup of the class' => sub { PVE::BackupAccess->setup([{ device => 'a' }]) },
        'teardown of the class' => sub { PVE::BackupAccess->teardown(1) },
    );
    for my $name (sort keys %call) {
        refused($call{$name}, qr/object of class/, $name);
    }
};

# ---- volumes ----

my $server = PBA::Test::NBDServer->start(
    size => 40 << 20,
    export => 'drive-scsi0',
    dirty => [[0, 65536]],
);
my %volume = (
    'nbd-path' => $server->socket_path,
    size => 40 << 20,
    'bitmap-mode' => 'reuse',
    'bitmap-name' => 'bitmap0',
);

sub open_refused ($device, $volume, $pattern, $name) {
    my $before = $server->connections;
    refused(sub { $Volume->open($device, $volume) }, $pattern, $name);
    is($server->connections, $before, "$name: no connection");
    return;
}

subtest 'open: device and hash' => sub {
    for my $device (undef, '', [], {}, $no_character, "drive-scsi0\0x") {
        open_refused($device, \%volume, qr/device/, 'device ' . shown($device));
    }
    for my $volume (undef, '', 'path', [], sub { }) {
        open_refused('drive-scsi0', $volume, qr/device drive-scsi0: .*hash/, shown($volume));
    }
    my $without = { size => 40 << 20 };
    open_refused('drive-scsi0', $without, qr/'nbd-path'/, 'without nbd-path');
};

my %bad_value = (
    size => [
        undef, '', -1, 1.5, '1e3', '0x10', '010', 'abc', ' 1', "1\n", '٣', '9' x 20, [], {},
        18446744073709551616
    ],
    'nbd-path' => [undef, '', [], {}, $server->socket_path . "\0", "/$no_character"],
    'bitmap-mode' => [undef, '', [], 'use', 'used', 'Reuse', 'new ', "reuse\0", '%s%n', "new\nx"],
    'bitmap-name' => [undef, '', [], {}, $no_character, "bitmap0\0"],
);

for my $key (sort keys %bad_value) {
    subtest "open: $key" => sub {
        for my $value ($bad_value{$key}->@*) {
            my $volume = { %volume, $key => $value };
            my $pattern = $key eq 'size' ? qr/\bsize\b/ : qr/\Q$key\E/;
            open_refused('drive-scsi0', $volume, $pattern, shown($value));
        }
    };
}

subtest 'open: mode and name' => sub {
    for my $mode (qw(new reuse)) {
        my %without = (%volume, 'bitmap-mode' => $mode);
        delete $without{'bitmap-name'};
        open_refused('drive-scsi0', \%without, qr/'$mode' needs a 'bitmap-name'/, "$mode without");
    }
};

# The hash as Proxmox VE passes it.
ok(
    eval {
        my %none = (%volume, 'bitmap-mode' => 'none', 'bitmap-name' => undef);
        $Volume->open('drive-scsi0', \%none);
    },
    'open: mode none with a bitmap-name of undef'
) or diag($@);

# The provider API may get new keys.
for my $key ('node-name', 'nbd_path', '', "a\nb") {
    ok(
        eval { $Volume->open('drive-scsi0', { %volume, $key => [] }) },
        'open: a key that is not known is ignored: ' . shown($key)
    ) or diag($@);
}

my @bad_numbers = (
    undef, '', -1, 1.5, '1e3', '0x10', '010', 'abc', ' 1', "1\n", '٣', '9' x 20, [], {}, \1,
    18446744073709551616, 'inf', 'nan',
);

subtest 'ranges' => sub {
    my $volume = $Volume->open('drive-scsi0', \%volume);
    my $size = 40 << 20;
    for my $method (qw(pread discard)) {
        for my $value (@bad_numbers) {
            my $what = "$method " . shown($value);
            refused(sub { $volume->$method($value, 1) }, qr/\boffset\b/, "$what, 1");
            refused(sub { $volume->$method(0, $value) },
                qr/\blength\b/, "$method 0, " . shown($value));
        }
        my @bad_ranges = (
            [0, 0],
            [$size, 0],
            [$size, 1],
            [$size - 1, 2],
            [0, $size + 1],
            [$size + 1, 1],
            ['9' x 19, 1],
            [1, '9' x 19],
            ['9' x 19, '9' x 19],
            [1, 9223372036854775807],
        );
        for my $range (@bad_ranges) {
            refused(sub { $volume->$method(@$range) },
                qr/drive-scsi0.*\brange\b/, "$method @$range");
        }
    }
    my $too_much = (32 << 20) + 1;
    refused(sub { $volume->pread(0, $too_much) }, qr/drive-scsi0.*at most 33554432/, 'a long read');
    for my $max (@bad_numbers, 0, 1_000_001, '9' x 19) {
        refused(sub { $volume->dirty_regions($max) }, qr/\bmax\b/, 'dirty_regions ' . shown($max));
    }
    is_deeply([map { $_->{command} } $server->requests], [], 'the server received no request');

    is(length($volume->pread($size - 1, 1)), 1, 'the volume still works');
    is_deeply([$volume->dirty_regions(1_000_000)], [0, 65536], 'the map can still be read');
    is_deeply([$volume->dirty_regions(1)], [], 'the map can be read to its end');
};

# The messages are Perl's own, and clear.
subtest 'wrong number of arguments' => sub {
    my $access = new_access();
    my $volume = $Volume->open('drive-scsi0', \%volume);
    my %call = (
        setup => sub { $access->setup },
        'setup of a list' => sub { $access->setup({ device => 'a' }, { device => 'b' }) },
        volumes => sub { $access->volumes },
        teardown => sub { $access->teardown },
        pread => sub { $volume->pread(0) },
        discard => sub { $volume->discard(0) },
        dirty_regions => sub { $volume->dirty_regions },
        next_dirty_region => sub { $volume->next_dirty_region(1) },
        size => sub { $volume->size(1) },
        open => sub { $Volume->open('drive-scsi0') },
    );
    for my $name (sort keys %call) {
        $calls = 0;
        ok(!eval { $call{$name}->(); 1 }, "$name: dies");
        is($calls, 0, "$name: nothing was sent");
    }
};

done_testing();
