package PBA::Test::StoreLife::Judge;

# Compares what a store says about its archives with their expected content. Either an archive is restored
# exactly as of its instant, or verify and restore both report it as damaged; and the latter only if a bit was
# flipped in a file that the archive consists of.

use v5.36;

use Exporter qw(import);
use File::Path ();

use PBA::Test::StoreLife::Image qw(digest_of);
use PBA::Test::StoreLife::Kept qw(digest kept slurp);
use PVE::BackupAccess::CLI::Restore;

our @EXPORT_OK = qw(judge looks_right);

# The file of a device in an archive.
my sub image_in ($path, $device) { return "$path/$device.qcow2" }

# Whether the images and the configuration are as expected, as far as this can be checked without QEMU.
sub looks_right ($path, $expected) {
    my $seen = eval {
        my @wrong = grep { digest_of(image_in($path, $_)) ne $expected->{content}{$_} }
            sort keys $expected->{content}->%*;
        !@wrong && slurp("$path/guest.conf") eq $expected->{config};
    };
    return $seen ? 1 : 0;
}

my sub named_by_verify ($provider, $name, $seen) {
    my $problems = eval { $provider->verify($name, $seen) } // [$@];
    return join("\n", $problems->@*);
}

# Captures what the command prints on the terminal.
my sub silently ($file, $code) {
    open(my $old, '>&', \*STDERR) or die "stderr: $!\n";
    open(STDERR, '>', $file) or die "$file: $!\n";
    my $status = eval { $code->() };
    my $error = $@;
    open(STDERR, '>&', $old) or die "stderr: $!\n";
    return defined($status) ? ($status, slurp($file)) : (1, $error || 'no status');
}

# Blanks the ranges that are reported as damaged, or the whole device if its digests are damaged: these may
# contain anything.
my sub without_told ($said, $device, $content) {
    return '' if $said =~ m/device \Q$device\E: a restored disk cannot be verified/;
    my ($line)
        = $said
        =~ m/\Q$device\E: archive \S+ is damaged: [0-9]+ bytes differ from what was read from the guest: (.*)/;
    return $content if !defined($line) || $line =~ m/ more;/;
    while ($line =~ m/([0-9]+) at offset ([0-9]+)/g) {
        substr($content, $2, $1) = "\0" x $1 if $1 + $2 <= length($content);
    }
    return $content;
}

# ('' if everything was restored as expected, the output of restore, what is wrong that it did not report).
my sub restored ($store, $name, $expected, $scratch) {
    my $target = "$scratch/restored";
    File::Path::remove_tree($target);
    mkdir($target);
    my ($status, $said)
        = silently("$scratch/said",
        sub { PVE::BackupAccess::CLI::Restore::run({ quiet => 1 }, "$store/$name", $target) });
    $said = "status $status" if $status != 0 && $said eq '';
    my (@wrong, @unnamed);
    my %is_known = map { ("$_.raw" => 1) } keys $expected->{content}->%*;
    for my $device (sort keys $expected->{content}->%*) {
        my $file = "$target/$device.raw";
        my $content = -e $file ? slurp($file) : undef;
        next if defined($content) && digest($content) eq $expected->{content}{$device};
        push(@wrong, $device);
        push(@unnamed, $device)
            if defined($content)
            && without_told($said, $device, $content) ne
            without_told($said, $device, kept($expected->{content}{$device}));
    }
    my $config = -e "$target/guest.conf" ? slurp("$target/guest.conf") : '';
    push(@wrong, 'configuration') if $config ne $expected->{config};
    push(@unnamed, 'configuration') if $config ne $expected->{config} && $config ne '';
    push(@unnamed,
        map { s{.*/}{}r } grep { !$is_known{s{.*/}{}r} && !m/guest\.conf\z/ } glob("$target/*"));
    return ("@wrong", $status != 0 ? $said : '', "@unnamed");
}

# Says what is wrong; undef if nothing is. is_spoilt: a bit was flipped in a file that the archive consists of.
sub judge ($provider, $store, $name, $expected, $is_spoilt, $scratch, $seen) {
    my $verify = named_by_verify($provider, $name, $seen);
    my ($wrong, $said, $unnamed) = restored($store, $name, $expected, $scratch);
    my $found = "verify: $verify\nrestore: $said";
    return "$name is lawful, and called damaged\n$found" if !$is_spoilt && "$verify$said" ne '';
    return "$name is lawful, and restored wrong: $wrong\n$found" if !$is_spoilt && $wrong ne '';
    return undef if $wrong eq '';
    return "$name is restored wrong ($wrong), and verify does not say so\n$found" if $verify eq '';
    return "$name is restored wrong ($wrong), and restore does not say so\n$found" if $said eq '';
    return "$name is restored wrong beside what restore named: $unnamed\n$found" if $unnamed ne '';
    return undef;
}

1;
