package PVE::BackupAccess::CLI::Copy;

# The subcommands copy and regions: Volume->copy and the dirty regions for programs in any language. The volume
# is given as JSON; progress and results are JSON lines.

use v5.36;

use JSON::PP ();

use PVE::BackupAccess::CLI qw(is_bad_usage usage_error);
use PVE::BackupAccess::CLI::Copy::Source qw(descriptor open_source);
use PVE::BackupAccess::CLI::Copy::Stream;
use PVE::BackupAccess::CLI::Output qw(parse_bytes write_all write_out);
use PVE::BackupAccess::Try qw(deaths_of is_own);

my $json = JSON::PP->new->utf8->canonical->allow_blessed->convert_blessed;
my $block = 65536;
my $map_batch = 10_000;

# The options of the command that are options of copy, and take a number of bytes.
my %numbers = map { $_ => 1 } qw(bandwidth-limit request-size cluster-size digest-block);

my sub number_of ($name, $text) {
    return $text if !$numbers{$name};
    return parse_bytes($text) // usage_error("--$name must be a number of bytes, not '$text'");
}

my sub copy_options ($opt) {
    return (
        (
            map { $_ => number_of($_, $opt->{$_}) }
                grep { defined($opt->{$_}) }
                qw(bandwidth-limit connections request-size cluster-size digests digest-block unchanged)
        ),
        $opt->{'without-base'} ? ('without-base' => 1) : (),
        $opt->{'no-discard'} ? (discard => 0) : (),
    );
}

my $is_stdout = qr{\A(?:-|1|/dev/stdout|/dev/fd/1|/proc/self/fd/1)\z};

# Returns a function that writes one JSON line to the status descriptor. The default is standard output, unless
# the data goes there.
my sub teller ($opt, $target) {
    my $number = $opt->{'status-fd'};
    usage_error('--status-fd 1 is standard output, to which the data goes')
        if $target =~ $is_stdout && ($number // '') eq '1';
    return sub ($line) { }
        if $target =~ $is_stdout && !defined($number);
    my $fh = defined($number) ? descriptor('--status-fd', $number, '>') : \*STDOUT;
    return sub ($line) {
        write_all($fh, 'the status descriptor', $json->encode($line) . "\n");
    };
}

my sub copy_to_stream ($volume, $is_increment, %options) {
    my $size = $options{'digest-block'} //= $block;
    my $part = $is_increment || defined($options{unchanged}) ? 1 : 0;
    my $stream = PVE::BackupAccess::CLI::Copy::Stream->new(\*STDOUT, $volume->size, $size, $part);
    my $statistics = $volume->copy(
        %options,
        to => sub ($offset, $data) { $stream->data($offset, $data) },
        digests => sub ($offset, $digests) { $stream->digests($offset, $digests) },
    );
    $stream->finish;
    return $statistics;
}

my sub copy_all ($opt, $target, $tell) {
    my ($volume, $is_increment) = open_source($opt);
    my %options = copy_options($opt);
    $options{progress} = sub ($done, $total) {
        $tell->({ type => 'progress', done => $done, total => $total });
    };
    my $statistics
        = $target eq '-'
        ? copy_to_stream($volume, $is_increment, %options)
        : $volume->copy(%options, to => $target);
    $volume->close;
    return $statistics;
}

sub run ($opt, $target) {
    usage_error('the data is binary, and standard output is a terminal - use a pipe or a file')
        if $target eq '-' && -t STDOUT;
    usage_error('--digests is not needed for a stream: its frames contain digests')
        if $target eq '-' && defined($opt->{digests});
    my $tell = teller($opt, $target);
    my $statistics;
    my ($death) = deaths_of(sub { $statistics = copy_all($opt, $target, $tell) });
    if ($death) {
        my ($error, $by_signal) = $death->@*;
        $tell->(
            {
                type => 'error',
                message => (is_bad_usage($error) ? $error->{message} : "$error") =~ s/\s+\z//r,
                is_own($error) ? (class => $error->class) : ()
            }
        ) if !$by_signal;
        die $error;
    }
    $tell->({ type => 'result', $statistics->%* });
    return 0;
}

# If the list of regions ends early, next_dirty_region dies, so the last line is not printed.
sub regions ($opt) {
    my ($volume) = open_source($opt);
    my ($count, $bytes) = (0, 0);
    while (my @regions = $volume->dirty_regions($map_batch)) {
        $count += @regions / 2;
        my $lines = '';
        while (my ($offset, $length) = splice(@regions, 0, 2)) {
            $lines .= qq({"offset":$offset,"length":$length}\n);
            $bytes += $length;
        }
        write_out($lines);
    }
    $volume->close;
    write_out(qq({"end":true,"regions":$count,"bytes":$bytes}\n));
    return 0;
}

1;
