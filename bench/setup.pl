#!/usr/bin/perl

# What setting up the access costs, and what the guest notices of it: a real guest writes to all its
# disks while accesses are set up and torn down on a stock QEMU. The times of single commands are
# taken from outside, by a proxy in front of the monitor.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../t/lib";

use File::Temp ();
use List::Util qw(max);
use Time::HiRes ();

use PBA::Bench;
use PBA::Bench::QMPProxy;
use PBA::Test::VM;

my $disk_size = 1 << 30;
my $rest_seconds = 0.2;

my $bench = PBA::Bench->new('setup', \@ARGV, 'rounds=i' => '[--rounds N]');
my $rounds = $bench->option('rounds', 20);
require PVE::BackupAccess;

sub measure ($disks, $cache) {
    my @ids = map { "disk$_" } 1 .. $disks;
    my $vm = PBA::Test::VM->start(
        disks => [map { { id => $_, size => $disk_size, cache => $cache } } @ids],);
    my $proxy = PBA::Bench::QMPProxy->start(target => $vm->qmp_path);
    my $dir = File::Temp->newdir('pba-bench-XXXXXXXX', TMPDIR => 1);
    my %setting = (
        vm => $vm,
        proxy => $proxy,
        devices => [map { $vm->disk($_)->{device} } @ids],
        dir => "$dir",
    );
    $vm->guest->start_churn(disks => \@ids);
    $vm->guest->wait_more_churn(20);

    # The first finds no bitmap and marks everything dirty, which later ones do not.
    one_round(\%setting);
    my @results = map { one_round(\%setting) } 1 .. $rounds;
    $vm->guest->stop_churn;
    return summary(@results);
}

sub new_access ($setting) {
    return PVE::BackupAccess->new(
        qmp => $setting->{proxy}->socket_path,
        'target-id' => 'bench',
        'run-dir' => $setting->{dir},
        'fleecing-dir' => $setting->{dir},
    );
}

# All in seconds.
sub one_round ($setting) {
    my %result;
    my ($guest, $proxy) = ($setting->{vm}->guest, $setting->{proxy});
    my $access = new_access($setting);
    my @devices = map { { device => $_, 'bitmap-mode' => 'use' } } @{ $setting->{devices} };

    my $began = Time::HiRes::time();
    ($result{setup}, $result{guest_during}) = longest_write(
        $guest,
        sub {
            $access->setup(\@devices);
            $access->volumes('nbd');
        }
    );
    $result{cut} = reopen_seconds($proxy, $began);

    Time::HiRes::sleep($rest_seconds);
    $began = Time::HiRes::time();
    ($result{teardown}, $result{guest_teardown}) = longest_write(
        $guest,
        sub {
            $access->teardown(1);
        }
    );
    $result{cut_back} = reopen_seconds($proxy, $began);

    Time::HiRes::sleep($rest_seconds);
    (undef, $result{guest_without}) = longest_write(
        $guest,
        sub {
            Time::HiRes::sleep($result{setup});
        }
    );
    return \%result;
}

# How long the code took and how long the guest's longest write in that time. The write under way at
# the end belongs to it, so it is waited for.
sub longest_write ($guest, $code) {
    $guest->latency;
    my $start = PBA::Bench::now();
    $code->();
    my $seconds = PBA::Bench::now() - $start;
    $guest->wait_more_churn(1);
    return ($seconds, $guest->latency->{longest_us} / 1e6);
}

sub reopen_seconds ($proxy, $since) {
    my @reopens = grep { $_->{command} eq 'blockdev-reopen' } $proxy->commands($since);
    die 'expected one blockdev-reopen, saw ' . @reopens . "\n" if @reopens != 1;
    die "blockdev-reopen failed\n" if $reopens[0]{error};
    return $reopens[0]{seconds};
}

sub summary (@results) {
    my %summary;
    for my $key (keys(%{ $results[0] })) {
        my @values = map { $_->{$key} } @results;
        $summary{$key} = 0 + sprintf('%.6f', PBA::Bench::median(@values));
        $summary{"${key}_max"} = 0 + sprintf('%.6f', max(@values));
    }
    return \%summary;
}

sub emit_json ($case, $summary) {
    my %ours = (seconds => $summary->{setup}, rss_kib => undef);
    my %more = map { ("${_}_seconds" => $summary->{$_}, "${_}_max" => $summary->{"${_}_max"}) }
        qw(cut cut_back teardown);
    my %guest = map { ("${_}_longest" => $summary->{"guest_$_"}) } qw(during teardown without);
    $guest{"${_}_longest_max"} = $summary->{"guest_${_}_max"} for qw(during teardown without);
    $bench->emit(
        case => $case,
        runs => $rounds,
        ours => { %ours, %more },
        guest => \%guest,
        peer => undef,
        ratio => undef,
        floor => undef
    );
    return;
}

my @columns = qw(cut cut_back setup teardown guest_during guest_teardown guest_without);
my @table = (['ms, median of ' . $rounds, map { tr/_/ /r } @columns]);
for my $cache (qw(none writeback)) {
    for my $disks (1, 2, 4) {
        my $case = "$disks disk" . ($disks > 1 ? 's' : '') . ", cache=$cache";
        my $summary = measure($disks, $cache);
        emit_json($case, $summary) if $bench->json_wanted;
        push @table, [$case, map { sprintf('%.1f', 1000 * $summary->{$_}) } @columns];
    }
}
$bench->print_table(@table) if !$bench->json_wanted;
