# Runs the tests as ./run test does: all of them on the machine's QEMU, then those that start a
# virtual machine on a newer one from a private prefix. A skip that is not expected is a failure.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use TAP::Harness;

use PBA::Test::Cache;

# A reason to skip that a machine may have; whatever else is skipped hides something.
my @expected_skips = (
    qr/\Ano \/dev\/fuse\b/,
    qr/\Aneeds root and loop devices\b/,
    qr/\Aneeds QEMU 10\.0 or later\b/,
    qr/\Aonly for QEMU before 10\.0\b/,
    qr/\Anot on a QEMU with Proxmox' commands\b/,
);

my @unexpected;

sub note_skip ($file, $reason) {
    return if grep { $reason =~ $_ } @expected_skips;
    push(@unexpected, "$file: $reason");
}

sub watch_skips ($parser, $job) {
    my $file = $job->[0];
    my $pattern = qr/# skip (.*)/i;
    my $look = sub ($line) { note_skip($file, $1) if $line->as_string =~ $pattern };
    $parser->callback(ALL => $look);
}

sub run_pass ($name, $environment, @files) {
    local @ENV{ keys $environment->%* } = values $environment->%*;
    say "== $name: ", scalar(@files), ' test files';
    my $harness = TAP::Harness->new(
        {
            lib => ['blib/lib', 'blib/arch', 't/lib'],
            jobs => 2,
            timer => 1,
            merge => 0,
        }
    );
    $harness->callback(made_parser => \&watch_skips);
    my $result = $harness->runtests(@files);
    return $result->all_passed;
}

sub starts_vm ($file) {
    open(my $fh, '<', $file) or die "$file: $!\n";
    return scalar(grep { m/PBA::Test::(?:VM|Backend|Front)\b/ } <$fh>);
}

my @files = @ARGV ? @ARGV : sort glob('t/*.t');
my @vm_files = grep { starts_vm($_) } @files;

PBA::Test::Cache->prepare if @vm_files;
my $passed = run_pass('this machine\'s QEMU', {}, @files);
if (@vm_files && !$ENV{PBA_QEMU}) {
    my %newer = PBA::Test::Cache->qemu10_env;
    $passed = run_pass('QEMU 10.0', \%newer, @vm_files) && $passed;
}
if (@unexpected) {
    say "unexpected skip: $_" for @unexpected;
    $passed = 0;
}
exit($passed ? 0 : 1);
