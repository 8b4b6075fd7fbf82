package PVE::BackupAccess::CLI::Map;

# The subcommand map. A dirty map can only be read through an access. The access ends as after a
# failed backup, so that the bitmap keeps every bit. The regions first go to a temporary file, so that
# the output is the whole map or nothing, and a slow reader of the output does not prolong the access.

use v5.36;

use File::Temp ();
use JSON::PP ();
use List::Util qw(max);

use PVE::BackupAccess::CLI qw(usage_error);
use PVE::BackupAccess;
use PVE::BackupAccess::CLI::Access qw(access_options bitmap_of is_tied text);
use PVE::BackupAccess::CLI::Disks qw(names_of_disk);
use PVE::BackupAccess::CLI::Guest qw(device_named);
use PVE::BackupAccess::CLI::Map::Heat;
use PVE::BackupAccess::CLI::Map::SVG;
use PVE::BackupAccess::CLI::Output qw(columns is_utf8_terminal say_out share write_file write_out);
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Try qw(ensure);

my $cluster = 65536;
my $batch = 10_000;
my $beside_strip = 16;    # columns for the text to the left and right of the strip

# With mode 'use', setup replaces a missing bitmap. A map must not do that, so it fails instead.
my sub check_action ($info) {
    my $action = $info->{'bitmap-action'};
    return if $action eq 'used';
    die "device $info->{device}: its bitmap has just been lost ($action)"
        . " - the next backup is a full one\n";
}

my sub read_regions ($volume, $each) {
    while (my @regions = $volume->dirty_regions($batch)) {
        while (my ($offset, $length) = splice(@regions, 0, 2)) {
            $each->($offset, $length);
        }
    }
}

# The request to setup that leaves the bitmap as it is, whatever name the backups use for the disk.
my sub request_for ($access, $device, $bitmap) {
    my %request = (device => $device, 'bitmap-mode' => 'use');
    return \%request if !is_tied($bitmap);
    my $seen = $access->_sizes_and_bases($device)->{$device};
    $request{base} = $seen->{base} // $seen->{'alias-base'}
        // die "device $device: its bitmap cannot be used: "
        . ($seen->{reason} // 'it has just been lost') . "\n";
    $request{identity} = $seen->{identity};
    return \%request;
}

# Calls $begin with the size, then $each with the regions, during the access.
my sub read_map ($options, $bitmap, $begin, $each) {
    my $access = PVE::BackupAccess->new($options->%*);
    my $device = $bitmap->{device};
    my $read = sub {
        my ($info) = $access->setup([request_for($access, $device, $bitmap)])->@*;
        check_action($info);
        $begin->($info->{size});
        my $volume = $access->volume($device);
        read_regions($volume, $each);
        $volume->close;
    };
    ensure($read, sub (@) { $access->teardown(0) if $access->_is_up });
}

# { device, target, size, dirty, regions, largest, heats => [one list for each number of parts],
# spool }
my sub collect ($options, $bitmap, $spool, @parts) {
    my $map = { device => $bitmap->{device}, target => $options->{'target-id'}, spool => $spool };
    $map->@{qw(dirty regions largest)} = (0, 0, 0);
    my $begin = sub ($size) {
        $map->{size} = $size;
        $map->{heats}
            = [map { PVE::BackupAccess::CLI::Map::Heat->new($size, $_, $cluster) } @parts];
    };
    my $each = sub ($offset, $length) {
        $map->{dirty} += $length;
        $map->{regions}++;
        $map->{largest} = max($map->{largest}, $length);
        $_->add($offset, $length) for $map->{heats}->@*;
        if ($spool) {
            print {$spool} pack('Q>Q>', $offset, $length)
                or die "cannot write the map to a temporary file: $!\n";
        }
    };
    read_map($options, $bitmap, $begin, $each);
    return $map;
}

my sub totals ($map) {
    my $text = bytes($map->{dirty}) . ' of ' . bytes($map->{size}) . ' dirty';
    return $text if !$map->{dirty};
    my $count = $map->{regions} == 1 ? '1 region' : "$map->{regions} regions";
    $count .= ', the largest ' . bytes($map->{largest}) if $map->{regions} > 1;
    return "$text (" . share($map->{dirty}, $map->{size}) . "), $count";
}

my sub print_strip ($map) {
    my $is_utf8 = is_utf8_terminal();
    my ($open, $close) = $is_utf8 ? ("\x{2595}", "\x{258f}") : ('|', '|');
    say_out("$map->{device}, target $map->{target}: " . totals($map));
    say_out('0 ' . $open . $map->{heats}[0]->strip($is_utf8) . $close . ' ' . bytes($map->{size}));
}

# One JSON object with one line for each region, written while the spool is read.
my sub print_json ($map) {
    my $json = JSON::PP->new->utf8->allow_nonref;
    my $line = sub ($key, $value) { sprintf("  %s: %s,\n", $json->encode($key), $value) };
    write_out(
        "{\n",
        $line->(device => $json->encode($map->{device})),
        $line->('target-id' => $json->encode($map->{target})),
        map { $line->($_->@*) }
            ([size => $map->{size}], [dirty => $map->{dirty}], ['region-count' => $map->{regions}])
    );
    write_out('  "regions": [');
    seek($map->{spool}, 0, 0) or die "cannot read the map again: $!\n";
    for my $i (1 .. $map->{regions}) {
        read($map->{spool}, my $packed, 16) == 16 or die "cannot read the map again: $!\n";
        my ($offset, $length) = unpack('Q>Q>', $packed);
        write_out(($i > 1 ? ',' : ''), qq(\n    {"offset": $offset, "length": $length}));
    }
    write_out($map->{regions} ? "\n  ]\n}\n" : "]\n}\n");
}

sub run ($opt, $device) {
    $device = device_named($opt, text($device));
    usage_error('--json and --svg exclude each other')
        if $opt->{json} && $opt->{svg};
    my $bitmap = bitmap_of($opt, $device, names_of_disk($opt->{qmp}, $device));
    $bitmap->{device} = $device;
    my $options = { access_options($opt), 'target-id' => $bitmap->{'target-id'} };
    if ($opt->{json}) {
        my $spool = File::Temp->new(TMPDIR => 1);
        binmode($spool);
        print_json(collect($options, $bitmap, $spool));
    }
    elsif (defined($opt->{svg})) {
        my $map = collect($options, $bitmap, undef, PVE::BackupAccess::CLI::Map::SVG::cells());
        my $title = "$map->{device}, target $map->{target}";
        my $svg = PVE::BackupAccess::CLI::Map::SVG::draw($map->{heats}[0], $title, totals($map));
        write_file($opt->{svg}, $svg);
    }
    else {
        print_strip(collect($options, $bitmap, undef, max(10, columns() - $beside_strip)));
    }
    return 0;
}

1;
