package PVE::BackupAccess::Libvirt::Description;

# Reads a domain's description in the form in which libvirt prints it: attributes in single quotes, one element
# per line, two spaces per level. Only a few elements and attributes are needed, so there is no XML parser.

use v5.36;

use Exporter qw(import);

our @EXPORT_OK = qw(disks_of element_text is_running user_of);

my %entities = (lt => '<', gt => '>', amp => '&', quot => '"', apos => q('));

my sub plain ($text) {
    return $text =~ s/&(?:#x([0-9a-fA-F]+)|#([0-9]+)|(\w+));/
        defined($1) ? chr(hex($1)) : defined($2) ? chr($2) : $entities{$3} \/\/ "&$3;"/ger;
}

# The attributes of the first element with that name.
my sub attributes ($xml, $element) {
    my ($text) = $xml =~ m/<$element\b((?:\s+[\w:-]+='[^']*')*)\s*\/?>/ or return {};
    my %found = $text =~ m/([\w:-]+)='([^']*)'/g;
    return { map { $_ => plain($found{$_}) } keys %found };
}

# The index of a target as libvirt counts them: vda is 0, vdz is 25, vdaa is 26.
my sub index_of ($target) {
    my ($letters) = $target =~ m/\A[a-z]d([a-z]+)\z/ or return;
    my $index = 0;
    $index = $index * 26 + ord($_) - ord('a') + 1 for split(m//, $letters);
    return $index - 1;
}

# The name that libvirt gives the guest device of a running domain, or undef if it cannot be known before the
# start.
my sub device_name ($xml, $target) {
    my $alias = attributes($xml, 'alias')->{name};
    return $alias if defined($alias);
    my ($bus, $name) = $target->@{qw(bus dev)};
    if ($bus =~ m/\A(?:scsi|ide|sata|fdc)\z/) {
        my $at = attributes($xml, 'address');
        my @place = $bus eq 'scsi' ? qw(controller bus target unit) : qw(controller bus unit);
        return if grep { !defined($at->{$_}) } @place;
        return $bus . join('-', $at->@{@place});
    }
    my $index = index_of($name);
    return defined($index) ? "$bus-disk$index" : undef;
}

my sub disk_of ($type, $kind, $xml) {
    my ($outer) = $xml =~ s{<(backingStore|mirror)\b.*?</\1>}{}gsr;
    my $target = attributes($outer, 'target');
    my $source = attributes($outer, 'source');
    return {
        kind => $kind,
        type => $type,
        target => $target->{dev} // '',
        device => device_name($outer, { bus => '', dev => '', $target->%* }),
        format => attributes($outer, 'driver')->{type} // 'raw',
        file => $source->{file} // $source->{dev},
        'read-only' => $outer =~ m/<readonly\b/ ? 1 : 0,
        shareable => $outer =~ m/<shareable\b/ ? 1 : 0,
    };
}

sub disks_of ($xml) {
    my ($devices) = $xml =~ m{^  <devices>\n(.*?)^  </devices>}ms or return;
    my @disks;
    while ($devices =~ m{^    <disk\b([^>]*)>(.*?)^    </disk>}gms) {
        my ($about, $content) = ($1, $2);
        my ($type) = $about =~ m/\btype='(\w+)'/;
        my ($kind) = $about =~ m/\bdevice='(\w+)'/;
        push(@disks, disk_of($type // 'file', $kind // 'disk', $content));
    }
    return @disks;
}

# ---- the domain ----

# The text of an element of the domain itself, not of a device or of another program's metadata.
sub element_text ($xml, $element) {
    my ($text) = $xml =~ m{^  <$element>([^<]*)</$element>}m;
    return defined($text) ? plain($text) : undef;
}

# A domain has an ID as long as it has a QEMU process, whatever its state.
sub is_running ($xml) { return $xml =~ m/^<domain\b[^>]*\bid='/m ? 1 : 0 }

# The user and group of QEMU in the label of libvirt's DAC security driver: '+64055:+109', or names. A disk may
# have its own label, which applies to the disk's file only.
sub user_of ($xml) {
    my ($label) = $xml =~ m{^  <seclabel\b[^>]*\bmodel='dac'[^>]*>\s*<label>([^<]*)</label>}m
        or return;
    my ($user, $group) = $label =~ m/\A\+?([^:]+):\+?([^:]+)\z/ or return;
    return ($user, $group);
}

1;
