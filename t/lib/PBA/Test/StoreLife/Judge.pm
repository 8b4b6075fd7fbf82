package PBA::Test::StoreLife::Judge;

# What a store says of its archives, held against what each must hold. An archive is either restored to
# exactly its instant, or verify and restore both name it as damaged; and that only where a bit was flipped in
# something that it is made of.

use v5.36;

use Exporter qw(import);
use File::Path ();

use PBA::Test::StoreLife::Image qw(content_of slurp state_of);
use PVE::BackupAccess::CLI::Restore;

our @EXPORT_OK = qw(judge looks_right);

# A device's file in an archive.
my sub image_in ($path, $device) { return "$path/$device.qcow2" }

# Whether images and configuration are what they must be, as far as can be seen without QEMU.
sub looks_right ($path, $expected) {
    my $seen = eval {
        my @wrong = grep { content_of(image_in($path, $_)) ne $expected->{content}{$_} }
            sort keys $expected->{content}->%*;
        !@wrong && slurp("$path/guest.conf") eq $expected->{config};
    };
    return $seen ? 1 : 0;
}

my sub named_by_verify ($provider, $name, $seen) {
    my $problems = eval { $provider->verify($name, $seen) } // [$@];
    return join("\n", $problems->@*);
}

# What the command says to the terminal.
my sub silently ($file, $code) {
    open(my $old, '>&', \*STDERR) or die "stderr: $!\n";
    open(STDERR, '>', $file) or die "$file: $!\n";
    my $status = eval { $code->() };
    my $error = $@;
    open(STDERR, '>&', $old) or die "stderr: $!\n";
    return defined($status) ? ($status, slurp($file)) : (1, $error || 'no status');
}

# The ranges that are told of a device, all of it where its digests are damaged: those may be anything.
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

# ('' if all was restored as it must be, what restore said, what is wrong beside what it named).
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
        next if defined($content) && $content eq $expected->{content}{$device};
        push(@wrong, $device);
        push(@unnamed, $device)
            if defined($content)
            && without_told($said, $device, $content) ne
            without_told($said, $device, $expected->{content}{$device});
    }
    my $config = -e "$target/guest.conf" ? slurp("$target/guest.conf") : '';
    push(@wrong, 'configuration') if $config ne $expected->{config};
    push(@unnamed, 'configuration') if $config ne $expected->{config} && $config ne '';
    push(@unnamed,
        map { s{.*/}{}r } grep { !$is_known{s{.*/}{}r} && !m/guest\.conf\z/ } glob("$target/*"));
    return ("@wrong", $status != 0 ? $said : '', "@unnamed");
}

# What is wrong, undef for nothing. is_spoilt: a bit was flipped in what the archive is made of.
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
